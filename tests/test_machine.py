"""Any history of adding, removing, activating, saving and loading leaves the base at what its path
means.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracle import NET, random_adapter
from oracle import net as base
from torch import Tensor

import lora_tree as lt

MODES = st.sampled_from(["merged", "unmerged"])


def adapter(seed: int) -> lt.Adapter:
    sites = [["0"], ["2"], ["0", "2"]][seed % 3]
    scale = (0.5, 2.0, 0.3)[seed % 3]
    return random_adapter({name: NET[name] for name in sites}, seed, r=seed % 4 + 1, scale=scale)


Value = dict[str, tuple[Tensor, Tensor, float]]


def value(of: lt.Adapter) -> Value:
    """The numbers of an adapter now, by module: A, B and scale."""
    return {
        n: (v.A.detach().double().clone(), v.B.detach().double().clone(), v.scale)
        for n, v in of.modules.items()
    }


class Switching(RuleBasedStateMachine):
    """The oracle is a dict of paths and a dense sum by hand; the bits are those of a model that was
    never switched.
    """

    @initialize(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def start(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.nodes: dict[str, tuple[Value, float]] = {}  # path → its increments, weight
        self.active: dict[str, float] = {}
        self.mode = "merged"
        self.tree = lt.AdapterTree()
        self.base = base(dtype)
        self.bare = {k: v.clone() for k, v in self.base.state_dict().items()}
        self.addresses = {k: v.data_ptr() for k, v in self.base.state_dict().items()}
        self.model = lt.attach(self.tree, self.base)
        self.folder = tempfile.TemporaryDirectory()
        self.saved: dict[str, tuple[Value, float]] | None = None

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def some(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.nodes)))

    def in_use(self) -> set[str]:
        return {
            "/".join(path.split("/")[: i + 1])
            for path in self.active
            for i in range(path.count("/") + 1)
        }

    @rule(
        data=st.data(),
        name=st.sampled_from("abc"),
        seed=st.integers(0, 50),
        weight=st.sampled_from([1.0, 0.7, -0.5]),
    )
    def add(self, data: st.DataObject, name: str, seed: int, weight: float) -> None:
        above = data.draw(st.sampled_from(["", *sorted(self.nodes)]))
        path = f"{above}/{name}" if above else name
        if path in self.nodes:
            return
        self.tree.add(path, adapter=adapter(seed), weight=weight)
        self.nodes[path] = value(adapter(seed)), weight

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), name=st.sampled_from("abcd"))
    def move(self, data: st.DataObject, name: str) -> None:
        path = self.some(data)
        above = data.draw(st.sampled_from(["", *sorted(self.nodes)]))
        to = f"{above}/{name}" if above else name
        below = [p for p in self.nodes if p == path or p.startswith(path + "/")]
        try:
            self.tree.move(path, to)
        except lt.errors.TreeError:
            assert (
                to in self.nodes or (to + "/").startswith(path + "/") or set(below) & self.in_use()
            )
        else:
            assert to == path or not set(below) & self.in_use()
            moved = {p: self.nodes.pop(p) for p in below}
            self.nodes |= {to + p[len(path) :]: node for p, node in moved.items()}

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), seed=st.integers(0, 50), weight=st.sampled_from([1.0, 0.3, None]))
    def update(self, data: st.DataObject, seed: int, weight: float | None) -> None:
        path = self.some(data)
        try:
            self.tree.update(path, adapter=adapter(seed), weight=weight)
        except lt.errors.TreeError:
            assert path in self.in_use()
        else:
            assert path not in self.in_use()
            self.nodes[path] = (
                value(adapter(seed)),
                self.nodes[path][1] if weight is None else weight,
            )

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), step=st.sampled_from([0.5, -0.25]))
    def train(self, data: st.DataObject, step: float) -> None:
        path = self.some(data)
        try:
            (group,) = self.model.trainable(path)
        except lt.errors.StateError:
            assert self.mode == "merged"
            assert path in self.in_use()
            return
        with torch.no_grad():
            for parameter in group["params"]:
                parameter.add_(step)
        self.model.trainable()
        # A step rounds in the factors' own dtype: what counts afterwards is what they then hold.
        shifted = {}
        for n, (A, B, scale) in self.nodes[path][0].items():
            shifted[n] = (A.float() + step).double(), (B.float() + step).double(), scale
        self.nodes[path] = shifted, self.nodes[path][1]

    @precondition(lambda self: self.nodes)
    @rule(
        data=st.data(),
        count=st.integers(1, 4),
        strategy=st.sampled_from(["auto", "nodes", "paths", "matrix"]),
    )
    def route(self, data: st.DataObject, count: int, strategy: Any) -> None:
        rows = [data.draw(st.sampled_from(["", *sorted(self.nodes)])) for _ in range(count)]
        x = torch.linspace(-1, 1, 5 * count).reshape(count, 5).to(self.dtype)
        with self.model.route(rows, strategy=strategy):
            got = self.base(x)
        before = self.active
        for row, path in enumerate(rows):
            self.active = {path: 1.0} if path else {}
            exact, _, _ = self.exact()
            self.close(got[row], self.dense(x[row].double(), exact))
        self.active = before

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        path = self.some(data)
        below = [p for p in self.nodes if p.startswith(path + "/")]
        try:
            self.tree.remove(path)
        except lt.errors.TreeError:
            assert below or path in self.in_use()
        else:
            assert not below
            assert path not in self.in_use()
            del self.nodes[path]

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), mode=MODES)
    def activate(self, data: st.DataObject, mode: Any) -> None:
        path = self.some(data)
        self.model.activate(path, mode=mode)
        self.active, self.mode = {path: 1.0}, mode

    @precondition(lambda self: self.nodes)
    @rule(
        data=st.data(),
        mode=MODES,
        weights=st.lists(st.sampled_from([0.5, 0.25, -1.0]), min_size=1, max_size=3),
    )
    def activate_a_blend(self, data: st.DataObject, mode: Any, weights: list[float]) -> None:
        blend = {self.some(data): w for w in weights}
        self.model.activate(blend, mode=mode)
        self.active, self.mode = blend, mode

    @rule()
    def deactivate(self) -> None:
        self.model.deactivate()
        self.active = {}

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), modes=st.lists(MODES, min_size=1, max_size=3), fails=st.booleans())
    def use(self, data: st.DataObject, modes: list[Any], fails: bool) -> None:
        before = self.active, self.mode
        try:
            with ExitStack() as stack:
                for mode in modes:
                    path = self.some(data)
                    stack.enter_context(self.model.using(path, mode=mode))
                    self.active, self.mode = {path: 1.0}, mode
                    self.the_base_is_what_the_path_means()
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        self.active, self.mode = before

    @rule()
    def save(self) -> None:
        self.tree.save(Path(self.folder.name) / "zoo")
        self.saved = dict(self.nodes)

    @precondition(lambda self: self.saved)
    @rule()
    def load(self) -> None:
        self.model.detach()
        self.tree = lt.load(Path(self.folder.name) / "zoo")
        assert self.saved is not None
        self.nodes, self.active = dict(self.saved), {}
        assert self.tree.paths() == sorted(self.nodes, key=lambda path: path.split("/"))
        self.model = lt.attach(self.tree, self.base)

    def coefficients(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for path, weight in self.active.items():
            for i in range(path.count("/") + 1):
                node = "/".join(path.split("/")[: i + 1])
                found[node] = found.get(node, 0.0) + weight
        return found

    def exact(self) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """What the weights should be, Σ|W| + Σ|s||B||A|, and Σr."""
        exact = {k: v.double() for k, v in self.bare.items()}
        size = {k: v.double().abs() for k, v in self.bare.items()}
        rank = 0
        for node, c in self.coefficients().items():
            own, weight = self.nodes[node]
            for name, (A, B, scale) in own.items():
                s, k = c * weight * scale, f"{name}.weight"
                exact[k] = exact[k] + s * (B @ A)
                size[k] = size[k] + abs(s) * (B.abs() @ A.abs())
                rank += len(A)
        return exact, size, rank

    def close(self, got: Tensor, wanted: Tensor) -> None:
        loose = (
            {"rtol": 0.05, "atol": 0.3}
            if self.dtype == torch.bfloat16
            else {"rtol": 1e-4, "atol": 1e-4}
        )
        torch.testing.assert_close(got.detach().double(), wanted, **loose)

    @invariant()
    def the_base_is_what_the_path_means(self) -> None:
        if not hasattr(self, "model"):
            return
        assert {k: v.data_ptr() for k, v in self.base.state_dict().items()} == self.addresses
        exact, size, rank = self.exact()
        if self.mode == "merged":
            fresh = base(self.dtype)
            lt.attach(self.tree, fresh).activate(self.active or "")
            for k, p in self.base.named_parameters():
                assert torch.equal(p, fresh.get_parameter(k)), k
                u = 2.0**-8 if self.dtype == torch.bfloat16 else 2.0**-24
                bound = u * p.abs().double() + (rank + 2) * 2.0**-24 * size[k]
                assert ((p.double() - exact[k]).abs() <= bound).all(), k
        else:
            assert all(torch.equal(p, self.bare[k]) for k, p in self.base.named_parameters())
            x = torch.linspace(-1, 1, 15).reshape(3, 5)
            self.close(self.base(x.to(self.dtype)), self.dense(x.double(), exact))

    @staticmethod
    def dense(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        return torch.tanh(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]


TestSwitching = Switching.TestCase
TestSwitching.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
