"""A mixture of experts on eight simulated devices: values and gradients of one device, and only the necessary collectives."""

import json

import pytest
import warm_python
from conftest import HELPERS

MESHES = ["expert and data", "expert, fsdp and tensor", "context and expert", "data"]
TOKENS, OF_A_TOKEN = 51, 2  # tokens without padding, and experts per token
WIDTH = 8


def run(*activations):
    done = warm_python.run([HELPERS / "experts_on_mesh.py", *activations], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results():
    return run("swiglu")


def check_values(results, activation):
    for dispatch in ("dropless", "capacity"):
        for mesh in MESHES:
            found = results[f"{dispatch} {activation} {mesh}"]
            assert found["difference"] < 1e-5, (dispatch, mesh, found)
            # Padding is not counted; dropped assignments are.
            assert found["sums"]["tokens"] == TOKENS and sum(found["sums"]["assignments"]) == TOKENS * OF_A_TOKEN
            assert abs(sum(found["sums"]["probabilities"]) - TOKENS) < 1e-3
            assert (found["sums"]["dropped"] > 0) == (dispatch == "capacity")
        assert results[f"{dispatch} pmap"]["difference"] < 1e-5
    assert results["pipeline"]["difference"] < 1e-5


def test_values_and_gradients_are_those_of_one_device(results):
    check_values(results, "swiglu")


def test_with_capacity_slots_are_exchanged_by_one_all_to_all_each_way(results):
    for mesh in MESHES:
        talk = results[f"capacity swiglu {mesh}"]["collectives"]
        assert talk.get("all-to-all", 0) == (0 if mesh == "data" else 4), talk  # and the same for the gradient
    assert "all-gather" not in results["capacity swiglu expert and data"]["collectives"]
    assert results["capacity swiglu context and expert"]["left whole"] == ["sequence of 3 does not divide over context=2"]  # slots of an expert


def test_dropless_gathers_tokens_within_their_group_and_scatters_results(results):
    talk = {mesh: results[f"dropless swiglu {mesh}"]["collectives"] for mesh in MESHES}
    assert not any(found.get("all-to-all") for found in talk.values())
    # Gathered: tokens, their experts and weights; in the gradient, that of the result. Summed: the result, and gradients of tokens and weights.
    assert talk["expert and data"]["all-gather"] == 4 and talk["expert and data"]["reduce-scatter"] == 3
    # With fsdp also the three kernels of an expert, once in each direction (forward and backward are one program here), and the router's.
    assert talk["expert, fsdp and tensor"]["all-gather"] == 4 + 3 + 1 and talk["expert, fsdp and tensor"]["reduce-scatter"] == 3 + 3
    assert "all-gather" not in talk["data"] and "reduce-scatter" not in talk["data"]
    # No device has all tokens: with data=2 it has half of the eight rows of eight.
    assert talk["expert and data"]["largest gather"] == 8 * 8 // 2 * WIDTH


def test_a_device_stores_only_its_experts(results):
    parts = {mesh: results[f"{dispatch} swiglu {mesh}"]["of the experts"] for dispatch in ("dropless", "capacity") for mesh in MESHES}
    assert parts == {"expert and data": 1 / 4, "expert, fsdp and tensor": 1 / 8, "context and expert": 1 / 4, "data": 1}


def test_experts_that_do_not_divide_are_named(results):
    assert "mlp/experts/down/kernel [6, 64, 16] (expert) does not divide over expert=4" in results["error"]


@pytest.mark.slow
def test_values_and_gradients_of_experts_that_are_not_gated():
    """pytest -m slow tests/models/test_experts_on_mesh.py: takes as long as the others together."""
    check_values(run("gelu"), "gelu")
