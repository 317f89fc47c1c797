"""Training runs: what the data says is what is learnt, and any stop resumes to the same bits."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import shell
import torch
import torch.nn.functional as F
from forked import Forked
from safetensors.torch import load_file, save_file
from sampling import slow

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.demo.bytelevel import new_base, save_base
from lora_tree.errors import DivergedError, FolderError, FormatError, PathError, SpecError
from lora_tree.runs import LossMatrix, Run, Settings, evaluate, loop, promote, read_rows
from lora_tree.runs.checkpoint_place import put_back, retire, staged_checkpoint
from lora_tree.runs.evaluation import evaluate_at
from lora_tree.runs.forecast import becoming_stale

END = 256
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ONE: dict[str, Any] = dict(steps=1, batch=4, accumulate=1, dropout=0.0, warm_up=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_base(new_base(hidden=32, layers=1, window=64), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(base)


@pytest.fixture
def zoo(tmp_path: Path, base: Path) -> Path:
    return shell.fresh_zoo(tmp_path / "zoo", base, r=2, target_modules=["q_proj", "down_proj"])


def data(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return file


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    paths = ("fr/legal", "fr/medical", "de")
    return data(
        tmp_path, *({"path": paths[i % 3], "text": f"row {i} of {paths[i % 3]}"} for i in range(12))
    )


def lora_tree(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert (left.value.code or 0) == code


# ---------------------------------------------------------------------- rows
def test_what_is_learnt_is_what_the_row_says(tmp_path: Path, zoo: Path, tokenizer: Any) -> None:
    file = data(
        tmp_path,
        {"path": "fr", "text": "abc"},
        "",
        {"path": "", "prompt": "ab", "completion": "c"},
        {"path": "de", "text": "abcdef"},
    )
    text, asked, long = read_rows([file], lt.load(zoo), tokenizer, max_length=5)
    assert (text.path, text.ids, text.labels) == ("fr", (97, 98, 99, END), (97, 98, 99, END))
    assert (asked.path, asked.ids, asked.labels) == ("", (97, 98, 99, END), (-100, -100, 99, END))
    assert (long.ids, long.cut, long.learnt) == ((97, 98, 99, 100, 101), True, 4)
    assert (asked.where, asked.cut) == (f"{file}:3", False)


def test_of_a_conversation_the_assistants_turns_are_learnt(
    tmp_path: Path, zoo: Path, base: Path
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = data(tmp_path, {"path": "fr", "messages": messages})
    with pytest.raises(SpecError, match=r"rows.jsonl:1: the tokenizer has no chat template"):
        read_rows([file], lt.load(zoo), tokenizer)
    tokenizer.chat_template = CHAT
    (row,) = read_rows([file], lt.load(zoo), tokenizer)
    assert bytes(row.ids).decode() == "[user]a[assistant]b[user]c[assistant]d"
    assert bytes(label for label in row.labels if label >= 0) == b"bd"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEWLINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen and Llama 3 split a text before they look for tokens: newlines in succession are one
piece.
"""


def trained(split: Any, texts: list[str], **more: Any) -> Any:
    """A tokenizer of a real kind, learnt from a few texts."""
    import transformers
    from tokenizers import Tokenizer, models, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = split
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False, **more
    )
    made.train_from_iterator(texts, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    wrapped.chat_template = CHATML
    return wrapped


def byte_level() -> Any:
    from tokenizers import Regex, decoders, pre_tokenizers

    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(NEWLINES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    texts = ["user hello assistant\n\n\n yes no\n\n\n so\n\n it\n"] * 50 + ["\n\n\n", "\n\n"] * 50
    return trained(
        (split, decoders.ByteLevel()), texts, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )


@pytest.mark.parametrize(
    "answers", [["yes"], ["\n\nyes"], ["\n", "\n\nno"], ["yes\n", "\nno", "so"]]
)
def test_an_answer_whose_first_token_would_join_the_prompt_is_learnt_whole(
    tmp_path: Path, zoo: Path, answers: list[str]
) -> None:
    tokenizer = byte_level()
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    (row,) = read_rows(
        [data(tmp_path, {"path": "fr", "messages": messages})], lt.load(zoo), tokenizer
    )
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    learnt: list[list[int]] = [[]]
    for token, label in zip(row.ids, row.labels, strict=True):
        if label == token:
            learnt[-1].append(token)
        elif learnt[-1]:
            learnt.append([])
    assert [tokenizer.decode(part) for part in learnt] == [
        f"{answer}<|im_end|>\n" for answer in answers
    ]
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    read = tokenizer(asked, add_special_tokens=False)[
        "input_ids"
    ]  # what the model has read when it answers
    assert list(row.ids[: len(read)]) == read
    assert row.labels[: len(read)] == (-100,) * len(read)


def test_a_template_or_a_tokenizer_that_can_not_be_split_at_a_turn_is_blamed_for_it(
    tmp_path: Path, zoo: Path
) -> None:
    from tokenizers import decoders, pre_tokenizers

    turns = [("user", "a"), ("assistant", "yes"), ("user", "b"), ("assistant", "yes")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = data(tmp_path, {"path": "fr", "messages": messages})
    changing = byte_level()
    changing.chat_template = CHATML.replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}"
    )
    with pytest.raises(
        SpecError,
        match=r"rows.jsonl:1: the chat template changes the earlier turns when turn 2 follows",
    ):
        read_rows([file], lt.load(zoo), changing)

    words = (
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        decoders.Metaspace(prepend_scheme="always"),
    )
    joining = trained(
        words, ["[assistant]yes hello user a b"] * 50
    )  # what it reads alone gets a space before it
    joining.chat_template = CHAT
    with pytest.raises(
        SpecError,
        match=r"rows.jsonl:1: the tokenizer joins text across .* at 'yes'",
    ):
        read_rows([file], lt.load(zoo), joining)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"path": "fr/leagl", "text": "abc"},
            "no node 'fr/leagl' in the tree; did you mean 'fr/legal'?",
        ),
        ({"path": "fr", "txt": "abc"}, "this has path, txt; did you mean 'text'?"),
        ({"text": "abc"}, "the row has no 'path', which says its node; it has text"),
        ({"path": "fr", "text": 3}, "'text' must be a string, got int"),
        ({"path": "fr", "text": ""}, "nothing is learnt from it"),
        (
            {"path": "fr", "text": "a", "prompt": "b", "completion": "c"},
            "a row has a path and text, or prompt",
        ),
        ({"path": "fr", "text": "a", "prompt": "b"}, "this has path, prompt, text"),
        ({"path": "fr", "prompt": "a", "complation": "b"}, "did you mean 'completion'?"),
        (
            {"pth": "fr", "text": "a"},
            "the row has no 'path', which says its node; it has pth, text; did you mean 'path'?",
        ),
        ({"path": "fr", "messages": []}, "'messages' must be a list of"),
        ('{"path": "fr"', "not valid JSON"),
        ("[1]", "a JSON list, but a file of rows has one JSON object on each line"),
        ("[", "jq -c '.[]' FILE > FILE.jsonl turns a list into such a file"),
        ("1", "expected a JSON object, got a number"),
    ],
)
def test_a_bad_row_is_told_with_its_line(
    tmp_path: Path, zoo: Path, tokenizer: Any, row: Any, said: str
) -> None:
    file = data(tmp_path, {"path": "fr", "text": "good"}, row)
    with pytest.raises((SpecError, FormatError, PathError)) as caught:
        read_rows([file], lt.load(zoo), tokenizer)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert said in str(caught.value)


def test_a_byte_order_mark_and_columns_of_the_users_own_are_taken(
    tmp_path: Path, zoo: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [{"path": "fr", "text": "abc"}, {"path": "de", "prompt": "ab", "completion": "c"}]
    own = [{"id": 7, **plain[0]}, {**plain[1], "source": {"url": "x"}, "id": "8", "tags": ["y"]}]
    file = tmp_path / "own.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n" for row in own).encode())
    tree = lt.load(zoo)
    wanted = read_rows([data(tmp_path, *plain)], tree, tokenizer)
    found = read_rows([file, file], tree, tokenizer)
    assert [(row.path, row.ids, row.labels) for row in found] == 2 * [
        (r.path, r.ids, r.labels) for r in wanted
    ]
    assert [row.extra for row in found] == 2 * [("id",), ("id", "source", "tags")]
    assert [row.where for row in found] == 2 * [f"{file}:1", f"{file}:2"]
    lora_tree("eval", zoo, "de", "--data", file, "--data", file)
    said = [line for line in capsys.readouterr().err.splitlines() if "columns" in line]
    assert said == ["columns that are not read: id, source, tags"]


def test_a_mark_inside_a_file_is_no_json_and_a_mark_alone_no_row(
    tmp_path: Path, zoo: Path, tokenizer: Any
) -> None:
    mark, row = b"\xef\xbb\xbf", b'{"path": "fr", "text": "abc"}\n'
    for raw, said in ((mark + b"\n", "no rows"), (row + mark + row, r":2: not valid JSON")):
        (tmp_path / "odd.jsonl").write_bytes(raw)
        with pytest.raises((SpecError, FormatError), match=said):
            read_rows([tmp_path / "odd.jsonl"], lt.load(zoo), tokenizer)


def test_files_without_rows_are_refused(tmp_path: Path, zoo: Path, tokenizer: Any) -> None:
    with pytest.raises(SpecError, match="no rows"):
        read_rows([data(tmp_path, "")], lt.load(zoo), tokenizer)
    with pytest.raises(FolderError, match=r"gone.jsonl: can't be read: No such file"):
        read_rows([tmp_path / "gone.jsonl"], lt.load(zoo), tokenizer)


# ---------------------------------------------------------------------- the loop
def started(zoo: Path, rows: Path, tokenizer: Any, folder: Path, **settings: Any) -> Run:
    import transformers

    tree = lt.load(zoo)
    torch.manual_seed(0)
    model = lt.attach(tree, transformers.LlamaForCausalLM.from_pretrained(tree.base))
    which = dict(
        nodes=settings.pop("nodes", ()),
        with_ancestors=settings.pop("with_ancestors", False),
        keep=settings.pop("keep", 1),
    )
    chosen = (
        dict(steps=6, batch=2, accumulate=2, lr=1e-2, dropout=0.2, warm_up=2, temperature=2.0)
        | settings
    )
    return Run(model, read_rows([rows], tree, tokenizer), Settings(**chosen), folder, **which)


def factors(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.factors.named_parameters()}


def same(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_stopped_anywhere_it_goes_on_to_the_same_bits(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    whole = started(zoo, rows, tokenizer, tmp_path / "whole")
    told = list(whole.steps())
    assert [step.number for step in told] == [1, 2, 3, 4, 5, 6]
    assert told[-1].tokens > 0
    parts: list[Any] = []
    for stop in (1, 4, 6):
        run = started(zoo, rows, tokenizer, tmp_path / "parts")
        assert run.done == len(parts)
        torch.manual_seed(stop)  # whatever else was drawn
        for step in run.steps():
            parts.append(step)
            if step.number == stop:
                run.save()
                break
    assert parts == told
    assert same(factors(run), factors(whole))
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["checkpoint-6"]


# ---------------------------------------------------------------------- which checkpoints stay
def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_best_and_the_last_checkpoints_stay(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [3.0, 1.0, 2.0, 4.0, 5.0, 6.0]
    monkeypatch.setattr(loop, "loss_of_rows", lambda *_, **__: losses.pop(0))
    run = started(zoo, rows, tokenizer, tmp_path / "run", keep=3, hold_back=0.34)
    list(run.steps(save_every=1))
    run.save()
    kept = ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    assert names(tmp_path / "run") == kept
    assert {p.name: loss for p, loss in run.kept().items()} == dict(
        zip(kept, (1.0, 5.0, 6.0), strict=True)
    )
    # All of them make room for the next run, which would take the last one for its own.
    run.finish()
    again = started(zoo, rows, tokenizer, tmp_path / "run", keep=3, hold_back=0.34, lr=0.5)
    assert again.done == 0
    assert names(tmp_path / "run") == ["finished-1"]
    assert names(tmp_path / "run/finished-1") == kept


def test_to_keep_the_best_changes_no_bit_of_a_run(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    plain = started(zoo, rows, tokenizer, tmp_path / "plain", hold_back=0.34)
    list(plain.steps(save_every=1))
    measured = started(zoo, rows, tokenizer, tmp_path / "measured", hold_back=0.34, keep=2)
    list(measured.steps(save_every=1))
    assert same(factors(measured), factors(plain))
    measured.save()
    loss = measured.kept()[tmp_path / "measured/checkpoint-6"]
    # By hand: each row alone, at its own path.
    measured.model.trainable()
    total = 0.0
    for row in measured.held_back:
        total += evaluate_at(measured.model, [row], row.path) * row.learnt
    tokens = sum(row.learnt for row in measured.held_back)
    assert loss == pytest.approx(total / tokens, rel=1e-5)


class Killed(BaseException):
    """What no cleanup may survive."""


def test_a_checkpoint_that_is_replaced_is_the_old_or_the_new_one_wherever_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, outcomes = "checkpoint-1", []

    def write(parent: Path, text: str) -> None:
        with staged_checkpoint(parent, name, writes=True, meet=lambda: None) as stage:
            (stage / name).mkdir()
            for file in ("x", "y"):
                (stage / name / file).write_text(text)

    def there(parent: Path) -> list[str]:
        return (
            [file.read_text() for file in (parent / name).iterdir()]
            if (parent / name).exists()
            else []
        )

    def killed(left: int) -> bool:
        """The second write, killed after so many operations, or come through."""
        turns = iter([False] * left)

        def killing(real: Any, *args: Any, **more: Any) -> Any:
            if next(turns, True):
                raise Killed
            return real(*args, **more)

        with monkeypatch.context() as patched:
            for operation in ("rename", "unlink", "rmdir"):
                patched.setattr(os, operation, partial(killing, getattr(os, operation)))
            try:
                write(parent, "new")
            except Killed:
                return True
        return False

    for at in range(100):
        parent = tmp_path / str(at)
        parent.mkdir()
        write(parent, "old")
        if not killed(at):
            break
        put_back(parent)
        assert there(parent) in (["old", "old"], ["new", "new"])
        outcomes.append(there(parent))
        shutil.rmtree(parent / name)  # by hand, to go back a step
        put_back(parent)
        assert there(parent) in ([], ["old", "old"]), "what is half removed does not come back"
        write(parent, "next")
        assert there(parent) == ["next", "next"]
        assert [p.name for p in parent.iterdir()] == [name]
    assert outcomes == sorted(outcomes, reverse=True)
    assert len(outcomes) > 5


def test_a_checkpoint_that_is_deleted_has_no_name_from_the_first_file_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"optimizer.pt", "nodes/fr/adapter_config.json", "nodes/fr/adapter_model.safetensors"}

    def there(checkpoint: Path) -> set[str]:
        return {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}

    for at in range(100):
        parent = tmp_path / str(at)
        for step in (1, 2):
            for file in files:
                (parent / f"checkpoint-{step}" / file).parent.mkdir(parents=True, exist_ok=True)
                (parent / f"checkpoint-{step}" / file).write_text("x")
        turns = iter([False] * at)

        def killing(real: Any, *args: Any, turns: Iterator[bool] = turns, **more: Any) -> Any:
            if next(turns, True):
                raise Killed
            return real(*args, **more)

        with monkeypatch.context() as patched:
            for operation in ("rename", "unlink", "rmdir"):
                patched.setattr(os, operation, partial(killing, getattr(os, operation)))
            try:
                retire(parent / "checkpoint-1")
            except Killed:
                killed = True
            else:
                killed = False
        assert there(parent / "checkpoint-2") == files
        assert there(parent / "checkpoint-1") in (set(), files)
        assert not (killed and at and (parent / "checkpoint-1").exists())
        with staged_checkpoint(parent, "checkpoint-3", writes=True, meet=lambda: None) as stage:
            (stage / "checkpoint-3").mkdir()
        wanted = (
            ["checkpoint-2", "checkpoint-3"]
            if at
            else ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
        )
        assert sorted(p.name for p in parent.iterdir()) == wanted
        if not killed:
            break
    assert at > 5


def test_a_run_goes_on_from_a_checkpoint_that_it_was_killed_at_replacing(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run")
    next(run.steps())
    run.save()
    (tmp_path / "run/.unfinished").mkdir()
    (tmp_path / "run/checkpoint-1").rename(tmp_path / "run/.unfinished/checkpoint-1.replaced")
    again = started(zoo, rows, tokenizer, tmp_path / "run")
    assert again.done == 1
    assert same(factors(again), factors(run))
    again.save()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


def test_a_resumed_run_is_refused_where_it_is_another(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run")
    next(run.steps())
    run.save()
    with pytest.raises(
        SpecError, match=r"checkpoint-1: of a run with other settings: lr was 0.01 and is 0.02\n"
    ):
        started(zoo, rows, tokenizer, tmp_path / "run", lr=0.02)
    with pytest.raises(SpecError, match=r"other nodes: was .* and is \['de'\]"):
        started(zoo, rows, tokenizer, tmp_path / "run", nodes=["de"])
    more = data(tmp_path, {"path": "de", "text": "another"}, name="more.jsonl")
    with pytest.raises(SpecError, match=r"other (rows|nodes)"):
        started(zoo, more, tokenizer, tmp_path / "run", nodes=run.nodes)
    (tmp_path / "run" / "checkpoint-1" / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"optimizer.safetensors"):
        started(zoo, rows, tokenizer, tmp_path / "run")


def test_a_step_is_torchs_own_on_the_loss_by_hand(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    """One leaf alone, all rows in one step: AdamW over the leaf's factors in a plain PEFT-like
    module, by hand.
    """
    import transformers

    run = started(zoo, rows, tokenizer, tmp_path / "run", nodes=["de"], **ONE)
    tree = run.model.tree
    before = {
        n: (v.A.detach().clone(), v.B.detach().clone(), v.scale)
        for n, v in tree.adapter("de").modules.items()
    }  # type: ignore[union-attr]
    plain = transformers.LlamaForCausalLM.from_pretrained(tree.base)
    pairs = {n: (A.requires_grad_(), B.requires_grad_()) for n, (A, B, _) in before.items()}
    for name, (A, B) in pairs.items():
        module, scale = plain.get_submodule(name), before[name][2]
        module.register_forward_hook(
            lambda m, args, out, A=A, B=B, s=scale: out + s * F.linear(F.linear(args[0], A), B)
        )
    losses = []
    for row in (r for r in run.rows if r.path == "de"):
        ids = torch.tensor([row.ids])
        losses += list(
            F.cross_entropy(plain(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        )
    assert len(run.rows) == 4
    torch.stack(losses).mean().backward()
    everything = [t for pair in pairs.values() for t in pair]
    torch.nn.utils.clip_grad_norm_(everything, 1.0)
    optimizer = torch.optim.AdamW(everything, lr=0.01 * run.settings.rate_at(0), weight_decay=0.0)
    optimizer.step()
    (step,) = run.steps()
    assert step.losses == {"de": pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)}
    for name, value in tree.adapter("de").modules.items():  # type: ignore[union-attr]
        for ours, theirs in zip((value.A, value.B), pairs[name], strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=2e-5)


def test_rows_that_train_nothing_are_left_out_and_told(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run", nodes=["fr/*"])
    assert (run.nodes, run.left_out, len(run.rows)) == (["fr/legal", "fr/medical"], 4, 8)
    run.model.detach()
    everything = started(zoo, rows, tokenizer, tmp_path / "run")
    assert everything.nodes == ["de", "fr/legal", "fr/medical"]
    assert everything.left_out == 0
    only = data(tmp_path, {"path": "", "text": "abc"}, name="only.jsonl")
    with pytest.raises(SpecError, match="no row goes through de"):
        started(zoo, only, tokenizer, tmp_path / "run", nodes=["de"])
    with pytest.raises(
        SpecError, match="the rows name no node with an adapter: they are all for the bare base"
    ):
        started(zoo, only, tokenizer, tmp_path / "run")
    with pytest.raises(SpecError, match="lr_of names 'fr'; what trains: de"):
        started(zoo, rows, tokenizer, tmp_path / "run", nodes=["de"], lr_of={"fr": 1.0})


def test_the_nodes_that_rows_name_train_and_those_above_them_on_request_alone(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run", dropout=0.0)
    before = {path: run.model.tree.adapter(path) for path in run.model.tree.paths()}
    told = [str(trained) for trained in run.trained]
    assert told == [
        "de: from new factors, on the bare base; 4 rows",
        "fr/legal: from new factors, on fr (frozen); 4 rows",
        "fr/medical: from new factors, on fr (frozen); 4 rows",
    ]
    start = {
        p: [t.detach().clone() for v in a.modules.values() for t in v.tensors]
        for p, a in before.items()
        if a
    }
    list(run.steps())
    for path in run.model.tree.paths():
        now = [t for v in run.model.tree.adapter(path).modules.values() for t in v.tensors]  # type: ignore[union-attr]
        unmoved = all(torch.equal(x, y) for x, y in zip(now, start[path], strict=True))
        assert unmoved == (path == "fr")
    run.model.detach()
    with_them = started(zoo, rows, tokenizer, tmp_path / "with", with_ancestors=True)
    assert with_them.nodes == ["de", "fr", "fr/legal", "fr/medical"]
    assert str(with_them.trained[2]) == "fr/legal: from new factors, on fr (trains, too); 4 rows"
    with_them.model.detach()
    named = started(
        zoo, rows, tokenizer, tmp_path / "named", nodes=["fr/legal"], with_ancestors=True
    )
    assert named.nodes == ["fr", "fr/legal"]


def test_a_run_that_is_refused_makes_nothing_train(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run", nodes=["de"])
    next(run.steps())
    run.save()
    model, of_de = run.model, run.rows
    everything = read_rows([rows], model.tree, tokenizer)
    wrong: list[tuple[list[str], Any, dict[str, Any]]] = [
        (["fr/legal"], of_de, {}),  # no row goes through it
        (["nobody"], everything, {}),
        (["fr/legal"], everything, {"lr_of": {"fr": 1.0}}),
        (["fr/legal"], everything, {"weights": {"x": 1.0}}),
        (["fr/legal"], everything, {}),  # another run is unfinished
    ]
    for nodes, read, settings in wrong:
        with pytest.raises((SpecError, PathError)):
            Run(model, read, Settings(**settings), tmp_path / "run", nodes=nodes)
        assert model.factors.training_paths == ["de"]


def test_the_first_and_last_loss_of_a_node_are_those_of_the_paths_through_it(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run", with_ancestors=True)
    steps = run.steps()
    told = [next(steps), next(steps)]
    run.save()
    run.model.detach()
    again = started(zoo, rows, tokenizer, tmp_path / "run", with_ancestors=True)
    told += again.steps()
    of_path = {
        path: [s.losses[path] for s in told if path in s.losses]
        for path in ("de", "fr/legal", "fr/medical")
    }
    found = again.losses()
    for path, losses in of_path.items():
        assert found[path] == (losses[0], losses[-1])
    below = of_path["fr/legal"], of_path["fr/medical"]
    assert found["fr"] == pytest.approx(tuple(sum(x[at] for x in below) / 2 for at in (0, -1)))


def test_a_finished_run_makes_room_for_the_next_and_an_unfinished_one_is_gone_on_with(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    place = tmp_path / "run"
    first = started(zoo, rows, tokenizer, place, nodes=["de"])
    list(first.steps())
    first.save()
    first.model.trainable()
    first.model.tree.save(zoo)
    first.finish()
    left = factors(first)
    first.model.detach()

    same_again = started(
        zoo, rows, tokenizer, place, nodes=["de"]
    )  # the very same, and nothing has changed since
    assert (same_again.was_over, same_again.done, list(same_again.steps())) == (True, 6, [])
    assert same(factors(same_again), left)
    assert same_again.losses() == first.losses()
    same_again.model.detach()

    second = started(zoo, rows, tokenizer, place, nodes=["fr/legal"])
    assert (second.done, second.was_over) == (0, False)
    assert second.aside is not None
    assert second.aside.folder == place / "finished-1" / "checkpoint-6"
    next(second.steps())
    second.save()
    assert sorted(p.name for p in place.iterdir()) == ["checkpoint-1", "finished-1"]
    second.model.detach()
    with pytest.raises(
        SpecError,
        match=r"other nodes: was \['fr/legal'\] and is \['de'\]\n  that run is not",
    ):
        started(zoo, rows, tokenizer, place, nodes=["de"])
    assert started(zoo, rows, tokenizer, place, nodes=["fr/legal"]).done == 1
    tree = lt.load(zoo)
    promote(tree, "de", place / "finished-1" / "checkpoint-6")


def test_a_run_begins_anew_where_its_nodes_or_those_above_have_changed_since(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    def finished() -> Run:
        run = started(zoo, rows, tokenizer, tmp_path / "run", nodes=["fr/legal"])
        list(run.steps())
        run.save()
        run.model.trainable()
        run.model.tree.save(zoo)
        run.finish()
        run.model.detach()
        return run

    finished()
    for path in ("fr/legal", "fr"):
        tree = lt.load(zoo)
        adapter = tree.adapter(path)
        assert adapter is not None
        tree.update(
            path, adapter=adapter.map(lambda value: lt.LowRank(value.A + 1, value.B, value.scale))
        )
        tree.save(zoo)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lt.StaleWarning)
            run = finished()
        assert run.aside is not None
        assert not run.was_over
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint-6",
        "finished-1",
        "finished-2",
    ]


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in (dict(steps=0), dict(lr=0.0), dict(lr=math.nan), dict(dropout=1.0),
                  dict(schedule="cosin"), dict(temperature=0.0), dict(warm_up=500),
                  dict(clip_norm=-1.0), dict(batch=True),
                  dict(weights={"a": -1.0})):  # fmt: skip
        with pytest.raises(SpecError, match="must be"):
            Settings(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- evaluation and promotion
def test_the_matrix_is_the_mean_loss_of_every_node_on_every_paths_rows(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run")
    list(run.steps())
    model = run.model
    model.trainable()
    found = evaluate(model, run.rows, batch=3)
    assert found.paths == ("", "de", "fr", "fr/legal", "fr/medical")
    assert found.domains == ("de", "fr/legal", "fr/medical")
    for i, path in enumerate(found.paths):
        for j, domain in enumerate(found.domains):
            losses = []
            with torch.no_grad(), model.using(path):
                for row in (r for r in run.rows if r.path == domain):
                    ids = torch.tensor([row.ids])
                    losses += F.cross_entropy(
                        model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"
                    ).tolist()
            assert found.losses[i][j] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
            assert found.tokens[j] == len(losses)
    picture = ElementTree.fromstring(found.picture())
    told = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {f"{found.losses[2][1]:.2f}", "(base)", "fr/legal"} <= set(told)


def test_a_checkpoint_of_a_run_becomes_a_node(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run", with_ancestors=True)
    next(run.steps())
    kept = run.save()
    tree = lt.AdapterTree()
    promote(tree, "de", kept)
    with pytest.warns(
        lt.StaleWarning, match="^de/more: fr/legal was trained on fr, and stands on de now$"
    ):
        promote(tree, "de/more", kept, node="fr/legal")
    want = run.model.tree.adapter("fr/legal")
    got = tree.adapter("de/more")
    assert want is not None
    assert got is not None
    for name, value in want.modules.items():
        torch.testing.assert_close(
            got.modules[name].dense(), value.dense().detach(), rtol=0, atol=0
        )
    with pytest.raises(
        PathError,
        match=r"no node 'fr/leagl' in it; did you mean 'fr/legal'\?\n  it has: de, fr, fr/legal",
    ):
        promote(tree, "x", kept, node="fr/leagl")
    with pytest.raises(FolderError, match="no folder nodes/ in it"):
        promote(tree, "x", tmp_path)


def test_a_node_comes_from_a_checkpoint_that_its_run_was_killed_at_replacing(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run")
    next(run.steps())
    kept = run.save()
    want = lt.Adapter.load(kept / "nodes/de").modules
    aside = tmp_path / "run/.unfinished" / f"{kept.name}.replaced"
    aside.parent.mkdir()
    kept.rename(aside)
    tree = lt.AdapterTree()
    promote(tree, "de", kept)
    got = tree.adapter("de")
    assert got is not None
    assert got.modules.keys() == want.keys()
    assert all(torch.equal(got.modules[name].B, value.B) for name, value in want.items())
    assert aside.is_dir(), "the run itself, which may be at work, finds it as it was"


def test_a_node_that_comes_without_its_ancestors_of_then_is_stale(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run", with_ancestors=True)
    steps = run.steps()
    next(steps), next(steps)
    kept = run.save()
    fresh = started(zoo, rows, tokenizer, tmp_path / "fresh").model
    fresh.detach()
    tree = fresh.tree
    with pytest.warns(
        lt.StaleWarning,
        match=r"fr/legal was trained on fr, and stands on fr now, with other numbers in fr",
    ):
        promote(tree, "fr/legal", kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        promote(tree, "fr", kept)
        promote(tree, "fr/legal", kept)  # the same numbers as then
        promote(tree, "de", kept)
    tree.update("fr", weight=0.5)
    with pytest.warns(lt.StaleWarning, match="with other numbers in fr"):
        promote(tree, "fr/legal", kept)
    for record, error in (
        ({"../fr": "1.0 trained"}, PathError),
        ({"fr": 1}, FormatError),
        ("fr", FormatError),
    ):
        save_file(
            {"x": torch.zeros(1)},
            kept / "factors.safetensors",
            {"stands_on": json.dumps({"fr/legal": record})},
        )
        with pytest.raises(error):
            promote(tree, "fr/legal", kept)


# ---------------------------------------------------------------------- the command line
@pytest.mark.filterwarnings("always::lora_tree.StaleWarning")
def test_train_eval_and_promote_from_the_shell(
    tmp_path: Path, zoo: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_tree("train", zoo, "fr/*", "de", "--data", rows, "--steps", 4, "--batch", 3, "--lr", 0.01,
              "--lr-of", "de=0.001", "--save-every", 2, "--json")  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["nodes"] == ["de", "fr/legal", "fr/medical"]
    assert (told["steps"], told["resumed_at"], told["left_out"]) == (4, 0, 0)
    assert told["checkpoint"] == str(zoo / ".training" / "checkpoint-4")
    assert lt.check(zoo) == []
    tree = lt.load(zoo, strict=True)
    B = load_file(zoo / "fr" / "legal" / "adapter_model.safetensors")
    assert any(t.abs().max() > 0 for name, t in B.items() if "lora_B" in name)
    assert tree["fr/legal"].has_adapter
    (made,) = lt.history(zoo)["fr/legal"]
    assert made.by is not None
    assert made.by.startswith(f"lora-tree train {zoo} 'fr/*' de --data")
    assert made.training is not None
    assert made.training.nodes == ["de", "fr/legal", "fr/medical"]
    assert made.training.data == lt.data_files([rows], zoo)
    assert (made.training.settings["lr"], made.training.run) == (0.01, ".training")
    assert made.losses == (told["first"]["fr/legal"], told["last"]["fr/legal"])

    lora_tree("eval", zoo, "--data", rows, "--picture", tmp_path / "matrix.svg", "--json")
    matrix = json.loads(capsys.readouterr().out)
    assert list(matrix["losses"]) == ["", "de", "fr", "fr/legal", "fr/medical"]
    assert matrix["losses"]["fr/legal"]["fr/legal"] < matrix["losses"][""]["fr/legal"]
    assert matrix["losses"]["fr"]["de"] == pytest.approx(
        matrix["losses"][""]["de"]
    )  # fr did not train
    ElementTree.parse(tmp_path / "matrix.svg")
    lora_tree("eval", zoo, "fr/*", "--data", rows, "--json")
    assert list(json.loads(capsys.readouterr().out)["losses"]) == ["", "fr/legal", "fr/medical"]
    lora_tree("eval", zoo, "de", "--data", rows, "--max-length", 4)
    printed = capsys.readouterr()
    assert "nats per token" in printed.out
    assert "12 of 12 rows were longer than --max-length, and cut" in printed.err

    lora_tree("promote", zoo, "de/again", "--from", told["checkpoint"], "--node", "de")
    assert (
        "warning: de/again: de was trained on the bare base, and stands on de now"
        in capsys.readouterr().err
    )
    assert lt.load(zoo).children("de") == ["de/again"]
    lora_tree("train", zoo, "--data", rows, "--run", zoo / "run", code=1)
    assert f"lies in {zoo}, where folders of adapters are nodes" in capsys.readouterr().err
    lora_tree("train", zoo, "--data", rows, "--lr-of", "de", code=1)
    assert "--lr-of de: expected a path and a number, like fr/legal=0.5" in capsys.readouterr().err


def test_an_earlier_version_is_measured_beside_the_present_one(
    zoo: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []
    for seed in (0, 1):
        lora_tree("train", zoo, "fr/legal", "--data", rows, "--steps", 2, "--lr", 0.05,
                  "--seed", seed)  # fmt: skip
        capsys.readouterr()
        lora_tree("eval", zoo, "fr/legal", "--data", rows, "--json")
        measured.append(json.loads(capsys.readouterr().out)["losses"]["fr/legal"])
    lora_tree("eval", zoo, "fr/legal@1", "fr/*", "--data", rows, "--json")
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert list(losses) == ["", "fr/legal", "fr/medical", "fr/legal@1"]
    # A path alone, and in one model with others, to the rounding of a sum.
    assert losses["fr/legal@1"] == pytest.approx(measured[0], rel=1e-6)
    assert losses["fr/legal"] == pytest.approx(measured[1], rel=1e-6)
    assert losses["fr/legal@1"] != pytest.approx(measured[1], rel=1e-3)
    lora_tree("eval", zoo, "--on", "fr/legal@1", "--data", rows, "--json")
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert losses["fr/legal"] == pytest.approx(measured[0], rel=1e-6)
    lora_tree("eval", zoo, "--on", "fr/legal", "--data", rows, code=1)
    assert "--on fr/legal names no version\n  write fr@2" in capsys.readouterr().err


def test_a_saved_child_that_never_trained_does_not_become_stale(tmp_path: Path) -> None:
    tree = lt.AdapterTree()
    for path, b in (("fr", 1.0), ("fr/new", 0.0), ("fr/old", 1.0)):
        value = lt.LowRank(torch.ones(1, 4), torch.full((4, 1), b))
        tree.add(path, adapter=lt.Adapter({"q": value}))
    tree.save(tmp_path / "zoo")
    assert becoming_stale(lt.load(tmp_path / "zoo"), ["fr"]) == ["fr/old"]
    assert becoming_stale(tree, ["fr"]) == ["fr/old"]


@pytest.mark.parametrize("place", ["run", "zoo"])
def test_a_place_that_cannot_be_written_is_told_before_the_first_step(
    zoo: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    # The user who runs the tests may write anywhere, so the system's answer is replaced.
    refused = tmp_path / "elsewhere" if place == "run" else zoo
    refused.mkdir(exist_ok=True)
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda at, mode: (at, mode) != (refused, os.W_OK) and may(at, mode)
    )
    run = refused / "run" if place == "run" else tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        main(["train", str(zoo), "--data", str(rows), "--steps", "3", "--run", str(run)])
    said = capsys.readouterr()
    assert (caught.value.code, "training 1/3" in said.err) == (1, False)
    where = run if place == "run" else zoo
    assert f"error: {where}: can't be written, so the run could not save" in said.err


def test_train_says_before_the_first_step_what_trains_and_what_becomes_stale_and_afterwards_what_is(
    zoo: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_tree("train", zoo, "--data", rows, "--steps", 3, "--lr", 0.01)
    said = capsys.readouterr()
    assert "becomes stale" not in said.err  # fr is new, and stays so
    before, after = said.err.split("training 1/3 ")
    assert "fr/legal: from new factors, on fr (frozen); 4 rows" in before
    assert "de: from new factors, on the bare base; 4 rows" in before
    assert re.search(r"training 3/3 .*fr/legal \d\.\d{3}", after)
    assert re.search(r"^fr/legal +(\d\.\d{3}) +(\d\.\d{3}) *$", said.out, re.MULTILINE)
    assert "stale now" not in said.out
    lora_tree("train", zoo, "--data", rows, "--steps", 3, "--lr", 0.01)
    said = capsys.readouterr()
    assert "this run has finished, and the tree has its nodes" in said.err
    assert "what trains" not in said.err
    assert said.out.splitlines()[-1].startswith("trained before: de, fr/legal")

    lora_tree("train", zoo, "fr", "--data", rows, "--steps", 2, "--lr", 0.01)
    said = capsys.readouterr()
    assert (
        "the run before this one, of de, fr/legal, fr/medical, is finished and lies in" in said.err
    )
    assert "fr: from new factors, on the bare base; 8 rows" in said.err
    assert "becomes stale: fr/legal, fr/medical" in said.err.split("training 1/2 ")[0]
    assert "stale now: fr/legal, fr/medical" in said.out
    with pytest.warns(lt.StaleWarning):
        stale = [
            path
            for path, node in ((p, lt.load(zoo)[p]) for p in ("de", "fr", "fr/legal"))
            if node.stale
        ]
    assert stale == ["fr/legal"]


def test_train_says_whether_the_rows_held_back_judge_a_leaf(
    zoo: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_tree("train", zoo, "--data", rows, "--steps", 1, "--hold-back", 0.25)
    assert "held back: 3 rows, to judge the leaves\n" in capsys.readouterr().err
    lora_tree("train", zoo, "fr", "--data", rows, "--steps", 1, "--hold-back", 0.25)
    assert (
        "held back: 2 rows, to judge leaves; none trains here, so --hold-back 0 would lose "
        "nothing\n" in capsys.readouterr().err
    )


def test_the_legend_of_the_losses_is_one_line(
    zoo: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_tree("eval", zoo, "de", "--data", rows)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "rows: the active path; columns: the path of the rows"


def test_a_run_that_diverges_stops_with_the_node_the_step_and_the_loss_and_saves_nothing(
    tmp_path: Path, zoo: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_tree("train", zoo, "de", "--data", rows, "--steps", 1)
    good = {
        file: file.read_bytes()
        for file in zoo.rglob("*")
        if file.is_file() and ".training" not in str(file)
    }
    lora_tree("train", zoo, "de", "--data", rows, "--steps", 5, "--lr", 1e30, "--save-every", 1,
              "--run", tmp_path / "run", code=1)  # fmt: skip
    said = capsys.readouterr().err
    assert re.search(
        r"error: de: step [2-5]: the (loss is|factors are) not finite; losses of this step: de ",
        said,
    )
    assert "a smaller learning rate" in said
    assert {file: file.read_bytes() for file in good} == good
    for kept in (tmp_path / "run").rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(kept).values())


def test_a_run_that_diverged_gives_back_what_it_began_with_and_is_over(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run", lr=1e30, warm_up=0)
    before = factors(run)
    with pytest.raises(DivergedError, match=r": step \d: the .* not finite; losses of ") as refused:
        list(run.steps(save_every=1))
    said = str(refused.value)
    assert ("earlier steps" in said) == (": step 1: " not in said)
    assert same(factors(run), before)
    for again in (run.save, lambda: list(run.steps())):
        with pytest.raises(DivergedError, match="this run is over"):
            again()


def test_what_is_not_finite_is_not_promoted(
    tmp_path: Path, zoo: Path, rows: Path, tokenizer: Any
) -> None:
    run = started(zoo, rows, tokenizer, tmp_path / "run")
    next(run.steps())
    kept = run.save()
    file = kept / "nodes/de/adapter_model.safetensors"
    save_file(
        {n: t * math.nan if "layers.0.mlp" in n else t for n, t in load_file(file).items()},
        file,
        {"format": "pt"},
    )
    before = run.model.tree.adapter("de")
    with pytest.raises(
        FormatError,
        match=r"checkpoint-1: de: model.layers.0.mlp.down_proj \(lora_A, lora_B\): the factors",
    ):
        promote(run.model.tree, "de", kept)
    assert run.model.tree.adapter("de") is before


def test_a_node_whose_losses_are_not_finite_is_told_and_drawn_all_the_same(
    tmp_path: Path, zoo: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_tree("train", zoo, "de", "--data", rows, "--steps", 1)
    file = zoo / "de/adapter_model.safetensors"
    save_file(
        {n: torch.full_like(t, 4e18) for n, t in load_file(file).items()}, file, {"format": "pt"}
    )
    lora_tree("lock", zoo)
    capsys.readouterr()
    lora_tree("eval", zoo, "--data", rows, "--picture", tmp_path / "matrix.svg", "--json")
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert losses["de"] == {"de": None, "fr/legal": None, "fr/medical": None}
    assert all(loss > 0 for loss in losses[""].values())
    lora_tree("eval", zoo, "--data", rows)
    assert "nan" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "matrix.svg")


def test_a_loss_that_is_not_finite_has_one_shade_and_leaves_the_others_theirs() -> None:
    def cells(*losses: float) -> list[tuple[str | None, str | None]]:
        matrix = LossMatrix(
            tuple("abcd"[: len(losses)]), ("x",), tuple((loss,) for loss in losses), (1,)
        )
        svg = "{http://www.w3.org/2000/svg}"
        drawn = list(ElementTree.fromstring(matrix.picture()).iter())
        shades = [part.get("fill") for part in drawn if part.tag == f"{svg}rect"]
        return list(
            zip(
                shades,
                [part.text for part in drawn if part.tag == f"{svg}text"][2::2],
                strict=False,
            )
        )

    low, high = cells(1.0, 2.0)
    grey = "rgb(208,208,208)"
    assert cells(1.0, math.nan, 2.0, math.inf) == [low, (grey, "nan"), high, (grey, "inf")]
    assert cells(math.inf, -math.inf) == [(grey, "inf"), (grey, "-inf")]


@pytest.mark.filterwarnings("always::lora_tree.StaleWarning")
def test_another_yaml_of_the_folder_is_trained_as_the_tree_that_it_is(
    zoo: Path, base: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, fixed = zoo / "other.yaml", (zoo / "tree.yaml").read_bytes()
    other.write_bytes(fixed)
    lora_tree("train", other, "de", "--data", rows, "--steps", 1, "--json")
    told = json.loads(capsys.readouterr().out)
    lora_tree("promote", other, "de/again", "--from", told["checkpoint"], "--node", "de")
    assert lt.load(other).children("de") == ["de/again"]
    assert lt.check(other) == []
    assert sorted(p.name for p in zoo.iterdir() if p.is_file()) == [
        "other.lock",
        "other.yaml",
        "tree.yaml",
    ]
    assert (zoo / "tree.yaml").read_bytes() == fixed
    other.write_text(other.read_text().replace(str(base), "org/other"))
    lora_tree("show", other)
    assert f"lora-tree lock --accept-stale {other}" in capsys.readouterr().out


@slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_killed_goes_on_to_the_same_tree(
    tmp_path: Path, zoo: Path, rows: Path, how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(folder: Path, run: Path) -> list[str]:
        words = ("train", folder, "--data", rows, "--with-ancestors", "--steps", 120, "--batch", 4,
                 "--lr", 0.01, "--dropout", 0.1, "--save-every", 3, "--run", run)  # fmt: skip
        return [str(word) for word in words]

    spare = tmp_path / "spare"
    spare.mkdir()
    (spare / "tree.yaml").write_bytes((zoo / "tree.yaml").read_bytes())
    code = "import sys; from lora_tree.cli import main; main(sys.argv[1:])"
    running = Forked(code, *command(zoo, tmp_path / "run"), errors_too=True)
    for _ in waiting(120):
        if any((tmp_path / "run").glob("checkpoint-*")):
            break
        assert running.process.is_alive(), running.end()
    running.send(how)
    left, told = running.end()
    if how != signal.SIGKILL:
        assert left == 128 + how
        assert "run the same command again to go on from" in told
    # The tree is written at the end.
    assert sorted(p.name for p in zoo.iterdir()) == [".runs", "tree.yaml"]
    lora_tree(*command(zoo, tmp_path / "run"))
    assert "going on after step" in capsys.readouterr().err
    lora_tree(*command(spare, tmp_path / "other"))
    for node in ("de", "fr", "fr/legal", "fr/medical"):
        file = f"{node}/adapter_model.safetensors"
        assert (zoo / file).read_bytes() == (spare / file).read_bytes()


def waiting(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)
    raise AssertionError("nothing came of it in time")
