"""The base's name: taken from the adapters where nobody else says it, and said where two names
differ.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from shell import Shell

import lora_tree as lt
from lora_tree.base_names import other_base
from lora_tree.folder import notes

CONFIG = "adapter_config.json"


def small_llama(name: str) -> transformers.LlamaForCausalLM:
    """A tiny Llama that calls itself ``name``, as `from_pretrained` would have it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.name_or_path = model.config._name_or_path = name
    return model


def trained_by_peft(folder: Path, base: str) -> None:
    """Save what PEFT saves of an adapter over a model of that name."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(small_llama(base), config).save_pretrained(
        folder, save_embedding_layers=False
    )
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == base


@pytest.mark.parametrize(
    ("one", "other", "different"),
    [
        ("org/model", "org/model", False),
        ("org/model", "Org/Model", False),
        ("org/model", "else/model", True),
        ("org/model-8b", "org/model-1b", True),
        ("org/model", "/models/model", False),
        ("org/model", "/models/model/", False),
        ("org/model", "/models/other", True),
        ("org/model", "/c/models--org--model/snapshots/1f", False),
        ("org/model", "/c/models--else--model/snapshots/1f", True),
        ("org/model", None, False),
        ("", "org/model", False),
    ],
)
def test_two_names_differ_only_where_that_is_known(
    one: str, other: str | None, different: bool
) -> None:
    assert other_base(one, other) is different
    assert other_base(other, one) is different


def test_one_folder_by_two_names_is_one_base(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "latest").symlink_to("model")
    assert not other_base(str(tmp_path / "model"), str(tmp_path / "latest"))
    assert other_base(str(tmp_path / "model"), str(tmp_path / "gone"))


# ---------------------------------------------------------------------- a folder without tree.yaml
def test_a_folder_without_tree_yaml_takes_its_base_from_its_adapters_where_they_agree(
    tmp_path: Path,
) -> None:
    trained_by_peft(tmp_path / "fr", "org/model")
    trained_by_peft(tmp_path / "fr/legal", "/models/model")
    assert lt.load(tmp_path).base == "org/model"
    assert notes(tmp_path) == []
    lt.lock(tmp_path)
    assert json.loads((tmp_path / "tree.lock").read_text())["base"] == {"name": "org/model"}
    tree = lt.load(tmp_path, strict=True)
    assert tree.base == "org/model"
    tree.save(tmp_path)
    assert not (tmp_path / "tree.yaml").exists()
    assert lt.load(tmp_path, strict=True).base == "org/model"


def test_adapters_that_do_not_agree_name_no_base(tmp_path: Path) -> None:
    trained_by_peft(tmp_path / "fr", "org/model")
    trained_by_peft(tmp_path / "de", "org/other")
    assert lt.load(tmp_path).base is None
    told = (
        "the adapters name different bases: 'org/other' (de); 'org/model' (fr); "
        "name the tree's own in a tree.yaml"
    )
    assert notes(tmp_path) == [told]
    (tmp_path / "tree.yaml").write_text(
        "version: 1\n"
    )  # and where there is a tree.yaml it alone counts
    shutil.rmtree(tmp_path / "de")
    assert lt.load(tmp_path).base is None


def test_a_base_that_the_adapters_named_stays_when_others_come_in(tmp_path: Path) -> None:
    trained_by_peft(tmp_path / "zoo/fr", "org/model")
    trained_by_peft(tmp_path / "de", "org/other")
    tree = lt.load(tmp_path / "zoo")
    tree.add("de", adapter=lt.Adapter.load(tmp_path / "de"))
    tree.save(tmp_path / "zoo")
    assert lt.load(tmp_path / "zoo").base == "org/model"


def test_the_base_of_a_folder_is_a_folder_s_own_path(tmp_path: Path) -> None:
    base = tmp_path / "models/base"
    small_llama("x").save_pretrained(base)
    trained_by_peft(tmp_path / "zoo/fr", str(base))
    assert lt.load(tmp_path / "zoo").base == str(base)
    lt.lock(tmp_path / "zoo")
    tree = lt.load(tmp_path / "zoo", strict=True)
    tree.update("fr", weight=0.5)
    tree.save(tmp_path / "zoo")
    again = lt.load(tmp_path / "zoo", strict=True)
    assert (again.base, again["fr"].weight) == (str(base), 0.5)


def test_a_base_that_the_lock_knows_is_found_without_the_tree_yaml(tmp_path: Path) -> None:
    base = tmp_path / "models/base"
    small_llama("x").save_pretrained(base)
    trained_by_peft(tmp_path / "fr", "else/model")
    tree = lt.AdapterTree(base=str(base))
    tree.add("fr", adapter=lt.Adapter.load(tmp_path / "fr"))
    tree.save(tmp_path / "zoo")
    (tmp_path / "zoo/tree.yaml").unlink()
    again = lt.load(tmp_path / "zoo", strict=True)
    assert again.base == str(base)
    again.save(tmp_path / "zoo")
    assert lt.load(tmp_path / "zoo", strict=True).base == str(base)
    assert not (tmp_path / "zoo/tree.yaml").exists()


# ---------------------------------------------------------------------- where names differ
def test_an_adapter_that_names_another_base_than_the_tree_is_said(tmp_path: Path) -> None:
    trained_by_peft(tmp_path / "fr", "org/model-8b")
    trained_by_peft(tmp_path / "de", "org/model-1b")
    (tmp_path / "tree.yaml").write_text("version: 1\nbase: org/model-8b\n")
    assert notes(tmp_path) == [
        "de: made for the base 'org/model-1b', the tree names 'org/model-8b'"
    ]
    assert lt.check(tmp_path) == []


def test_attaching_to_another_model_than_the_tree_or_an_adapter_names_is_said(
    tmp_path: Path,
) -> None:
    trained_by_peft(tmp_path / "zoo/fr", "org/model-8b")
    trained_by_peft(tmp_path / "zoo/de", "org/model-1b")
    (tmp_path / "zoo/tree.yaml").write_text("version: 1\nbase: org/model-8b\n")
    base = small_llama("org/model-1b")
    with pytest.warns(lt.BaseWarning) as warned:
        model = lt.attach(lt.load(tmp_path / "zoo"), base)
    assert [str(one.message) for one in warned] == [
        "the tree names the base 'org/model-8b', but the model attached is 'org/model-1b'"
    ]
    assert warned[0].filename == __file__
    model.activate("de")
    with pytest.warns(lt.BaseWarning) as warned:
        model.activate("fr")
    model.activate("de")
    model.activate("fr")  # and once only
    assert [str(one.message) for one in warned] == [
        "fr names the base 'org/model-8b', but the model attached is 'org/model-1b'"
    ]
    model.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "zoo/tree.yaml").unlink()
        for name in ("/models/model-8b", ""):
            model = lt.attach(lt.load(tmp_path / "zoo"), small_llama(name))
            model.activate("fr")


def test_a_line_about_a_node_names_no_base_that_is_the_tree_s_own(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    value = lt.LowRank(torch.ones(2, 4), torch.ones(4, 2))
    for name, base in (("same", "base"), ("other", "org/else")):
        lt.Adapter({"q": value}, base=base).save(f"new/{name}")
    lt.AdapterTree(base=str(tmp_path / "base")).save("zoo")
    assert "made for" not in shell("add", "zoo", "same", "new/same")[1]
    assert ", made for org/else\n" in shell("add", "zoo", "other", "new/other")[1]
