"""The public verbs in any order, on random networks: what is pruned works, and nothing else changes.

`LNR_PRUNE_STATEFUL=300 pytest tests/test_stateful.py` for a long run.
"""

import os
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.errors import GraphError, PlanError
from lnr_prune.settings import Amount
from lnr_prune.testing import networks
from tests.helpers.models import outputs
from tests.helpers.untouched import Untouched

COUNT = int(os.environ.get("LNR_PRUNE_STATEFUL", "4"))
REFITS = (lnr.Refit(), lnr.Refit(window=2, iterations=2), None)


class Verbs(RuleBasedStateMachine):
    """One network, what it was pruned to last, and a folder."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "pruned.safetensors")
        self.pruned: lnr.Pruned | None = None
        self.pruned_from: nn.Module | None = None

    @initialize(network=networks(max_patterns=3), seed=st.integers(0, 9))
    def start(self, network: tuple[nn.Module, Tensor], seed: int) -> None:
        self.model, example = network
        generator = torch.Generator().manual_seed(seed)
        self.data = torch.randn(12, *example.shape[1:], generator=generator)
        self.prunable = bool(lnr.inspect(self.model, self.data).groups)
        self.before = Untouched(self.model, Path(self.folder.name, "none"))

    @rule()
    def inspect(self) -> None:
        found = lnr.inspect(self.model, self.data)
        assert bool(found.groups) == self.prunable
        assert 0 <= found.reachable <= 1

    @rule(keep=st.sampled_from([0.3, 0.6, 1, 0.99]), selector=st.sampled_from(["group_lasso", "norm", "random"]),
          batch=st.sampled_from([1, 5, 12]), refit=st.sampled_from(REFITS))  # fmt: skip
    def prune(self, keep: float, selector: str, batch: int, refit: lnr.Refit | None) -> None:
        self._prune(self.model, lnr.Keep(keep), batch, selector, refit)

    @rule(ratio=st.sampled_from([0.0, 0.05, 0.5, 2.0]), batch=st.sampled_from([4, 12]))
    def prune_by_penalty(self, ratio: float, batch: int) -> None:
        self._prune(self.model, lnr.Penalty(ratio=ratio), batch)

    @precondition(lambda self: self.pruned is not None)
    @rule(keep=st.sampled_from([0.5, 1]))
    def prune_again(self, keep: float) -> None:
        assert self.pruned
        model = self.pruned.model
        before = Untouched(model, Path(self.folder.name, "none"))
        self._prune(model, lnr.Keep(keep))
        before.check()

    @precondition(lambda self: self.pruned is not None)
    @rule()
    def save(self) -> None:
        assert self.pruned
        self.pruned.save(self.path)
        assert sorted(os.listdir(self.folder.name)) == [self.path.name]
        assert lnr.load_plan(self.path) == self.pruned.plan
        self.stored, self.stored_from = self.pruned, self.pruned_from

    @precondition(lambda self: self.path.exists())
    @rule(checked=st.booleans())
    def load(self, checked: bool) -> None:
        assert self.stored_from
        loaded = lnr.load(self.path, self.stored_from, example=self.data[:2] if checked else None)
        for name, value in self.stored.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
        torch.testing.assert_close(outputs(loaded, self.data), outputs(self.stored.model, self.data))

    @precondition(lambda self: self.pruned is not None)
    @rule()
    def apply(self) -> None:
        assert self.pruned
        assert self.pruned_from
        applied = lnr.apply_plan(self.pruned.plan, self.pruned_from, example=self.data[:2])
        shapes = {name: value.shape for name, value in self.pruned.model.state_dict().items()}
        assert {name: value.shape for name, value in applied.state_dict().items()} == shapes

    @precondition(lambda self: self.pruned is not None and self.pruned.plan)
    @rule()
    def apply_to_another_model(self) -> None:
        assert self.pruned
        try:
            lnr.apply_plan(self.pruned.plan, self.pruned.model)
        except PlanError:
            return
        raise AssertionError("a plan was applied to the model that it had been applied to")

    @rule(value=st.sampled_from([float("nan"), float("inf")]))
    def prune_on_bad_data(self, value: float) -> None:
        try:
            lnr.prune(self.model, [self.data, torch.full_like(self.data, value)], lnr.Keep(0.5))
        except lnr.LnrPruneError:
            return
        raise AssertionError("data that is not finite was taken")

    @invariant()
    def nothing_else_has_changed(self) -> None:
        if hasattr(self, "before"):
            self.before.check()

    def teardown(self) -> None:
        self.folder.cleanup()

    def _prune(
        self,
        model: nn.Module,
        amount: Amount,
        batch: int = 12,
        selector: str = "group_lasso",
        refit: lnr.Refit | None = REFITS[0],
    ) -> None:
        try:
            pruned = lnr.prune(model, self.data.split(batch), amount, selector=selector, refit=refit)
        except GraphError:
            assert not self.prunable or model is not self.model  # the first prune may have left nothing to take
            return
        expected = outputs(model, self.data, pruned.masked)
        torch.testing.assert_close(outputs(pruned.model, self.data), expected, rtol=1e-3, atol=1e-4)
        self.pruned, self.pruned_from = pruned, model


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(
    max_examples=COUNT,
    stateful_step_count=6,
    deadline=None,
    derandomize=COUNT < 50,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # to shrink a failure would take an hour
)
