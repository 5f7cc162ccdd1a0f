"""Run folders with names that are not UTF-8, and steps that are symbolic links."""

import os

import pytest
import small_configs

import jaxmodels
from jaxmodels.cli import main as cli
from jaxmodels.errors import ConfigError
from jaxmodels.runs.checkpoint import Checkpoints
from jaxmodels.runs.folder import RunFolder

pytestmark = pytest.mark.faults

ODD = os.fsdecode(b"run-\xff")


@pytest.mark.parametrize("command", [["train", "--config=x.json"], ["evaluate"], ["generate", "--prompt=x"], ["lineage"]], ids=lambda c: c[0])
def test_an_argument_that_is_not_utf8(command, tmp_path, capsys):
    assert cli.run([*command, f"--workdir={tmp_path}/{ODD}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jaxmodels: --workdir={tmp_path}/run-\\xff is not valid UTF-8.")


def test_a_working_directory_that_is_not_utf8(tmp_path, monkeypatch):
    (tmp_path / ODD).mkdir()
    monkeypatch.chdir(tmp_path / ODD)
    with pytest.raises(ConfigError, match=r"run-\\xff/x, is not valid UTF-8"):
        RunFolder("x")
    with pytest.raises(ConfigError, match="is not valid UTF-8"):
        jaxmodels.train(small_configs.CNN, "x", quiet=True)


def test_images_whose_names_are_not_utf8(tmp_path):
    from PIL import Image

    from jaxmodels.data.registry import open_dataset

    for name in ("a", os.fsdecode(b"b\xff")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (4, 4)).save(os.path.join(tmp_path, "train", name, os.fsdecode(b"%d\xfe.png" % number)), "png")
    dataset = open_dataset(f"images:{tmp_path}", {"size": 4}, None)
    assert dataset.splits["train"][0]["image"].shape == (4, 4, 3) and isinstance(dataset.splits["train"].fingerprint(), int)
    RunFolder(tmp_path / "x").write_config({})
    RunFolder(tmp_path / "x").update_manifest(info=dataset.info)
    assert RunFolder(tmp_path / "x").manifest()["info"]["labels"] == ["a", os.fsdecode(b"b\xff")]


def test_a_step_that_is_a_symbolic_link(tmp_path):
    """Somebody has moved it to another disk. It is read, and neither it nor the link is deleted."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()

    def train(steps):
        # A fake of a longer plan: the same run stopped after `steps`.
        class Stop(jaxmodels.Callback):
            def on_step(self, run, step, metrics):
                if step == steps:
                    raise KeyboardInterrupt

        config = small_configs.config(small_configs.CNN, checkpoint__keep=1, evaluation__every=None)
        try:
            return jaxmodels.train(config, str(run), quiet=True, callbacks=[Stop()])
        except KeyboardInterrupt:
            return None

    def move(step):
        os.rename(run / "checkpoints" / str(step), disk / str(step))
        os.symlink(disk / str(step), run / "checkpoints" / str(step))

    train(25)
    move(20)
    train(35)  # resumes from the link
    assert RunFolder(run).manifest()["starts"][-1]["from_step"] == 20
    assert os.path.islink(run / "checkpoints" / "20") and (disk / "20" / "state").is_dir()
    move(30)
    assert train(1000).step == 60
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"20", "30", "60"}
    assert {path.name for path in disk.iterdir()} == {"20", "30"}
    checkpoints = Checkpoints(RunFolder(run).checkpoints, read_only=True)
    assert checkpoints.steps() == [20, 30, 60] and checkpoints.progress(30).seconds > 0
    checkpoints.close()
    assert jaxmodels.evaluate(f"{run}@30")["step"] == 30
    RunFolder(run).clear()
    assert not (run / "checkpoints").exists() and (disk / "20" / "state").is_dir()


def test_a_run_whose_name_looks_like_a_step_of_another(tmp_path):
    """`lr@10` is the folder of that name if there is one, and else step 10 of `lr`."""
    config = small_configs.config(small_configs.CNN, training__steps=10, evaluation={}, checkpoint={"every": 5, "keep": 2})
    jaxmodels.train(config, tmp_path / "lr", quiet=True)
    assert jaxmodels.load(f"{tmp_path}/lr@10").step == 10 and jaxmodels.load(f"{tmp_path}/lr@5").step == 5
    jaxmodels.train(small_configs.config(config, training__steps=6), tmp_path / "lr@10", quiet=True)
    assert jaxmodels.load(f"{tmp_path}/lr@10").step == 6 and jaxmodels.load(f"{tmp_path}/lr@10@5").step == 5
    assert jaxmodels.load(f"{tmp_path}/lr@latest").step == 10
