"""`jaxmodels config --explain` and docs/reference.md: every key, its type, default and meaning."""

import contextlib
import io
import re

import pytest
import small_configs
from conftest import ROOT

from jaxmodels.cli import main as cli
from jaxmodels.config import flatten, load_config
from jaxmodels.errors import ConfigError
from jaxmodels.experiment import reference
from jaxmodels.experiment.sections import resolve

GROUPS = reference.groups()


def explained(section: str, name: str) -> set[str]:
    """Return the keys that a section with this name may have, without the arguments of an Optax optimizer."""
    return {key.name for group in GROUPS if group.section == section and (not group.names or name in group.names) for key in group.keys}


def test_entries_of_a_docstring():
    text = """
        Args:
          width, heads: D and N;
            N must divide D.
          rate: of dropout: 0 for none.
            see: not an entry, since it is indented more.

        Returns:
          rest: not an argument.
    """
    entries = reference.docstring_entries(text)
    meaning = "D and N; N must divide D."
    assert entries == {"width": meaning, "heads": meaning, "rate": "of dropout: 0 for none. see: not an entry, since it is indented more."}
    assert reference.docstring_entries(None) == {}


def test_every_key_has_a_meaning():
    assert len(GROUPS) > 40
    empty = [
        f"{group.names}: {key.name}" for group in GROUPS for key in group.keys if len(key.meaning.split()) < 2 or re.fullmatch(r"[Ss]ee `\w+`\.?", key.meaning)
    ]
    assert not empty, empty


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_key_of_a_resolved_config_is_explained(path, published):
    resolved = resolve(load_config(f"{path}:{published(path.stem)}" if "_hf_" in path.stem else str(path)))
    own = {"data.source": "source"}
    for section, values in resolved.items():
        if not isinstance(values, dict) or section in ("init_from", "lora", "compiler_options"):
            assert section in explained("", ""), section
            continue
        name = str(values.get(own.get(f"{section}.source", "name"), "")).partition(":")[0]
        known = explained(section, name)
        for key in values:
            by_optax = section == "optimizer" and reference.explain(f"optimizer.{key}")
            assert f"{section}.{key}" in known or by_optax, f"{section}.{key} of {name!r}"


def test_types_and_defaults():
    keys = {key.name: key for group in GROUPS if not group.names for key in group.keys}
    assert (keys["training.ema"].type, keys["training.ema"].default) == ("a number or none", "none")
    assert (keys["optimizer.learning_rate"].type, keys["optimizer.learning_rate"].default) == ("a number", "required")
    assert keys["partition"].type == "one of 'jit', 'pmap'"
    assert keys["optimizer.schedule.warmup"].default == "`0`"
    assert keys["training.freeze"].type == "a list of strings"
    [group] = reference.explain("model.gpt2-xl")
    assert {key.name: key.default for key in group.keys}["model.width"] == "`1600`"
    defaults = flatten(resolve(small_configs.CNN))
    for name in ("checkpoint.keep", "optimizer.schedule.final", "sharding.context", "mesh.data"):
        assert keys[name].default == f"`{defaults[name]!r}`", name


def test_keys_of_names_and_nested_sections():
    assert {group.names for group in reference.explain("model.hidden")} == {("cnn",)}
    nested = [key.name for group in reference.explain("optimizer.schedule") for key in group.keys]
    assert nested == ["optimizer.schedule", *(f"optimizer.schedule.{key}" for key in ("name", "warmup", "decay", "final"))]
    [adamw] = reference.explain("optimizer.adamw")
    assert all(key.meaning for key in adamw.keys) and "optimizer.b1" in {key.name for key in adamw.keys}
    assert any("adamw" in group.names for group in reference.explain("optimizer.b1"))


@pytest.mark.parametrize(
    ("key", "message"),
    [("optimizer.lerning_rate", "Did you mean 'optimizer.learning_rate'?"), ("model.cnm", "Did you mean 'model.cnn'?"), ("qqq", "Sections: model, task")],
)
def test_an_unknown_key(key, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        reference.explain(key)


def test_the_command(capsys):
    assert cli.run(["config", "--explain=checkpoint.keep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "checkpoint.keep: a whole number; default `2`; may change in a run: yes" and lines[1].strip()
    assert cli.run(["config", "--explain=model"]) == 0
    out = capsys.readouterr().out
    assert "model cnn:" in out and "features, hidden, dropout" in out and "model.NAME" in out
    assert cli.run(["config", "--explain=checkpoint.kep"]) == 2
    assert cli.run(["config"]) == 2
    assert "--config=FILE or --explain=KEY" in capsys.readouterr().err


def test_the_page_is_what_the_command_prints():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.run(["config", "--explain=all", "--markdown"]) == 0
    page = (ROOT / "docs" / "reference.md").read_text()
    assert page == out.getvalue(), "run: python -m jaxmodels config --explain all --markdown > docs/reference.md"
