"""The `Handle`: one adapter on a model, what is trained, where it sits, and what can be done with it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorafit import activation, adapted, merging, store, together
from lorafit.adapted import bank_of, check_removable, uninstall, walk
from lorafit.errors import StateError
from lorafit.hooks import Binding, StepHooks, check_gradients, check_held, check_unused, quick, with_copies
from lorafit.layers import Shape, Site, Sites, sparse
from lorafit.ledger import LEDGER, Ledger
from lorafit.method import Adapter, Method
from lorafit.methods import validate
from lorafit.peft_layout import Description, Placed
from lorafit.plan import Modules, Planned
from lorafit.rows import rows
from lorafit.summary import summary

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)


class Handle:
    """One adapter on a model: what is trained, where it sits, and what can be done with it."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        method: Method,
        planned: Sequence[Planned],
        saved: Mapping[str, nn.Module],
    ) -> None:
        self.model = model
        self.name = name
        self.method = method
        self._sites = Sites({site.path: site.site.module for site in planned})
        self._methods = {site.path: site.method for site in planned}
        self._saved = dict(saved)
        self._folded: list[merging.Folded] | None = None
        self._bound: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.schedule = method.schedule({path: self._adapter(site) for path, site in self._sites.items()})

    def __getstate__(self) -> dict[str, Any]:
        # An optimizer's hooks belong to the process that registered them.
        return {**self.__dict__, "_bound": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _bound=weakref.WeakSet())

    def __repr__(self) -> str:
        ledger = vars(self.model).get(LEDGER)
        if not isinstance(ledger, Ledger) or self.name not in ledger.names:
            return f"<Handle {self.name!r}: {self.method.name}, detached>"
        return f"<Handle {self.name!r}: {self.summary()}>"

    @property
    def sites(self) -> Mapping[str, Site]:
        """Module path → site, in model order."""
        return MappingProxyType(self._sites)

    @property
    def saved(self) -> Mapping[str, nn.Module]:
        """Module path → module of which this adapter trains a full copy."""
        return MappingProxyType(self._saved)

    @property
    def copies(self) -> Mapping[str, nn.Module]:
        """Module path → the full copy that this adapter trains in the module's place."""
        return MappingProxyType({path: entry for path, entry in self._entries() if path in self._saved})

    def method_at(self, path: str) -> Method:
        """The method as it is at one site: with the rank and alpha that a pattern gave it there."""
        self.adapter(path)
        return self._methods[path]

    def adapter(self, path: str) -> Adapter:
        """The adapter at one site. Raises `StateError` for a path that is no site."""
        activation.check_site(path, self._sites)
        return self._adapter(self._sites[path])

    def _adapter(self, site: Site) -> Adapter:
        bank = bank_of(site.module)
        if bank is None or self.name not in bank:
            raise StateError(
                f"adapter {self.name!r} is not attached any more",
                expected="an attached adapter",
                fix="attach it again",
            )
        adapter = bank[self.name]
        assert isinstance(adapter, Adapter)
        return adapter

    def entries(self) -> dict[str, nn.Module]:
        """Module path → what stands there: the adapter of a site, or the full copy of a module."""
        return dict(self._entries())

    def _entries(self) -> Iterator[tuple[str, nn.Module]]:
        for path, site in self._sites.items():
            yield path, self._adapter(site)
        for path, module in self._saved.items():
            bank = bank_of(module)
            assert bank is not None
            yield path, bank[self.name]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("module path.tensor", parameter) for everything this adapter trains, shared tensors once."""
        seen: set[int] = set()
        for path, entry in self._entries():
            for key, parameter in entry.named_parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{key}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """Everything this adapter trains."""
        return [parameter for _, parameter in self.named_parameters()]

    @property
    def num_trainable(self) -> int:
        """How many numbers this adapter trains: the method's formula, plus the modules saved in full."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_total(self) -> int:
        """How many numbers the base model has, shared tensors once."""
        own = {id(p): p.numel() for _, m, _ in walk(self.model) for p in m._parameters.values() if p is not None}
        return sum(own.values())

    def shapes(self) -> list[Shape]:
        """The matrix shape of every site, in model order."""
        return [site.shape for site in self._sites.values()]

    def summary(self) -> str:
        """One line: method, resolved settings, sites, trained share."""
        return summary(self.method, [*self._sites.values()], len(self._saved), self.num_trainable, self.num_total)

    # Which adapters act

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the model's adapters that act now, in the order of attaching."""
        return activation.active_names(self.model, self._ledger().names)

    def activate(self, names: str | Sequence[str] | None) -> None:
        """Chooses which of the model's adapters act from now on; several add up; None leaves the base model.

        Raises:
            StateError: a name that is not attached, two adapters of which one would hide the other, or an adapter left
                out that is merged into the weights and so acts anyway.
        """
        activation.activate(self.model, self._ledger().names, names)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model gives the base model's exact outputs, even if this adapter is merged.

        A merged one comes back at the end; until then no adapter of the model can be merged, unmerged or detached.
        """
        before = self.active
        ledger = self._ledger()
        merged = None
        if self._folded is not None:
            merged = merging.lift(self._folded)
            self._restore()
            ledger.lifted = self.name
        self.activate(None)
        try:
            yield
        finally:
            if merged is not None:
                ledger.lifted = None
                self._folded = merging.refold(merged)
                self._mark(merged=True)
            self.activate(before)

    def rows(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Within it row i of a batch has the adapter `names[i]` of those attached; None is the base model.

        What each row gives is what its adapter gives alone, up to the rounding of sums, in training too. Where nothing
        is differentiated a layer computes its own output once for all rows (`lorafit.mixed`).

        Args:
            names: one for each row that the layers see, whichever adapters are active.

        Raises:
            ConfigError: no sequence of names.
            StateError: a name that is not attached, a merged adapter, or rows that have adapters already; in a forward
                pass, an input that has not one row for each name, or adapters that were activated, disabled, merged,
                attached or detached within.
        """
        return rows(self.model, self._ledger().names, names)

    def fuse(self, *args: Any, **kwargs: Any) -> list[tuple[str, ...]]:
        """Has layers that read the same input, as q, k and v do, computed as one operation from now on.

        The results are the same up to the rounding of sums; with dropout the layers of a group drop the same numbers of
        x. Their outputs go through one backward pass. A layer whose input is not that of its group computes by itself,
        as do layers with pre-hooks and compiled ones. See `lorafit.kernels.siblings`.

        Args:
            *args: a batch, as the model takes it: one forward pass shows which layers read what.
            **kwargs: the same.

        Returns:
            The paths of each group that was found.

        Raises:
            StateError: a layer was replaced, or no layer of the adapter was called.
        """
        self.check_sites("fuse")
        groups = together.find(self.model, self._sites, partial(self.model, *args, **kwargs))
        adapted.group({path: site.module for path, site in self._sites.items()}, groups)
        return groups

    # Training

    def param_groups(self, lr: float, *, copies_lr: float | None = None) -> list[dict[str, Any]]:
        """The method's optimizer parameter groups at base learning rate `lr`, and at `copies_lr` (`lr`) full copies.

        Raises:
            StateError: the adapter was loaded for inference, is merged or gone.
        """
        self.check_sites("train")
        named = self._trained()
        activation.check_apart(self.name, merged=self.merged)
        copied = {id(parameter) for copy in self.copies.values() for parameter in copy.parameters()}
        groups = self.method.param_groups([each for each in named if id(each[1]) not in copied], lr)
        copies = [parameter for _, parameter in named if id(parameter) in copied]
        return with_copies(groups, copies, lr if copies_lr is None else copies_lr)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        named = list(self.named_parameters())
        activation.check_trainable(self.name, named)
        return named

    def optimizer(
        self,
        kind: type[AnyOptimizer],
        lr: float,
        *,
        total_steps: int | None = None,
        copies_lr: float | None = None,
        **options: Any,
    ) -> AnyOptimizer:
        """An optimizer of class `kind` over this adapter's parameter groups, with its step hooks installed.

        Args:
            kind: the class, such as ``torch.optim.AdamW``.
            lr: the base learning rate.
            total_steps: optimizer steps of the whole run, for methods whose schedule is a share of it (AdaLoRA).
            copies_lr: the learning rate of modules trained in full, if it is another one.
            options: further arguments of `kind`. Adam, AdamW and SGD get ``fused=True`` unless `fused`, `foreach` or
                `differentiable` is among them: one kernel for all of an adapter's small tensors.
        """
        groups = self.param_groups(lr, copies_lr=copies_lr)
        if not any(sparse(copy) for copy in self.copies.values()) and quick(kind, self._trained(), options):
            options["fused"] = True
        return self.bind(kind(groups, **options), total_steps=total_steps)

    def bind(
        self, optimizer: AnyOptimizer, *, total_steps: int | None = None, allow_unused: bool = False
    ) -> AnyOptimizer:
        """Installs what the method does around the step in an optimizer made elsewhere; twice is once.

        The state of a schedule is then part of ``optimizer.state_dict()``.

        Args:
            optimizer: holds this adapter's parameters.
            total_steps: as for `optimizer`.
            allow_unused: do not raise for sites without a gradient at the first step (experts that no token reached).

        Raises:
            StateError: the adapter was loaded for inference.
            TrainingError: now, if the optimizer lacks parameters of the adapter, or had steps that the schedule did not
                see; at its first step, if a site got no gradient (after that step, if it was given a closure that
                computes the gradients).
        """
        if optimizer in self._bound:
            return optimizer
        check_held(optimizer, self._trained())
        if total_steps is not None:
            validate.whole("total_steps", total_steps, fix="total_steps=1000: the optimizer steps of the run")
        if self.schedule is not None:
            check_unused(optimizer, self.schedule, self.parameters())
            self.schedule.begin(total_steps)
        check = partial(self._check_first_step, allow_unused)
        binding = Binding(self.name, self.method.name, check, self.named_parameters, self.schedule, self.entries)
        StepHooks.of(optimizer).add(binding)
        self._bound.add(optimizer)
        return optimizer

    def _check_first_step(self, allow_unused: bool) -> None:
        self.check_sites("train")
        idle = None
        if self.name not in self.active:
            idle = (f"adapter {self.name!r} is not active", f"handle.activate({self.name!r})")
        elif self._folded is not None:
            idle = (f"adapter {self.name!r} is merged", "handle.unmerge()")
        check_gradients(list(self.named_parameters()), idle, allow_unused)

    def _modules(self) -> list[tuple[str, nn.Module]]:
        return [*((path, site.module) for path, site in self._sites.items()), *self._saved.items()]

    def check_sites(self, doing: str) -> None:
        """Raises `StateError` for a layer that was replaced after attach, as `resize_token_embeddings` does."""
        activation.check_in_place(self.model, self._modules(), self.name, doing)

    # Merging

    @property
    def merged(self) -> bool:
        """Whether this adapter is folded into the weights now."""
        return self._folded is not None

    def delta(self, site: str | Site) -> Tensor:
        """W' − W of one site, dense, in the base weight's own shape, in at least single precision.

        Raises:
            StateError: no such site, or another adapter is merged into a weight on which this one's change depends.
        """
        if isinstance(site, str):
            self.adapter(site)
            site = self._sites[site]
        if self._folded is not None:
            with self.disabled():
                return merging.change(site, self._adapter(site))
        path = next((key for key, each in self._sites.items() if each.module is site.module), "")
        activation.check_unscaled([(path, site.module)], [self.name])
        return merging.change(site, self._adapter(site))

    def merge(self, *, untie: bool = False) -> None:
        """Folds the adapter into the weights, for inference at the base model's cost; `unmerge` undoes it exactly.

        The originals of the changed weights are kept in memory; `merge_and_detach` keeps none.

        Args:
            untie: give a weight that another layer shares a copy of its own instead of refusing.

        Raises:
            MergeError: a shared weight, a value that would not be finite, another adapter merged already, or one that
                rescales the merged weight (DoRA).
            StateError: the adapter is not active, so that merging it would change what the model computes.
        """
        activation.check_settled(self._ledger().lifted)
        activation.check_active(self.name, self.active)
        self._fold(untie=untie, keep=True)

    def _fold(self, *, untie: bool, keep: bool) -> None:
        self.check_sites("merge")
        merging.check_unmerged(self.model)
        merging.check_alone(self._sites, self.name, keep=keep)
        self._folded = merging.fold(self.model, self._sites, self._saved, self.name, untie=untie, keep=keep)
        self._mark(merged=True)

    def unmerge(self) -> None:
        """Puts the original weights back, bit for bit. Raises `StateError` if it is not merged, or in `disabled`."""
        activation.check_settled(self._ledger().lifted)
        if self._folded is None:
            raise StateError(f"adapter {self.name!r} is not merged", fix="merge it first")
        self._restore()

    def _restore(self) -> None:
        assert self._folded is not None
        activation.check_read(self.model, self._modules(), "unmerge")
        for row in reversed(self._folded):
            row.undo()
        self._folded = None
        self._mark(merged=False)

    def _mark(self, *, merged: bool) -> None:
        for _, module in self._modules():
            bank = bank_of(module)
            assert bank is not None
            others = tuple(name for name in bank.merged if name != self.name)
            bank.set(merged=(*others, self.name) if merged else others)

    def detach(self) -> None:
        """Takes the adapter out; after the last one the model is bit for bit what it was before `attach`.

        Raises:
            StateError: it is out already, a layer got another class since (`fully_shard` does that), or a merged
                adapter is out of the weights for a while (`disabled`).
        """
        ledger = self._ledger()
        activation.check_settled(ledger.lifted)
        check_removable(self._modules(), self.name)
        if self._folded is not None:
            self._restore()
        for _, module in self._modules():
            uninstall(module, self.name)
        ledger.names = tuple(name for name in ledger.names if name != self.name)
        if not ledger.names:
            own = dict(self.model.named_parameters(remove_duplicate=False))
            for key in ledger.trainable:
                if key in own:
                    own[key].requires_grad_(True)
            delattr(self.model, LEDGER)

    def merge_and_detach(self, *, untie: bool = False) -> None:
        """Makes the model a plain one with the adapter folded in, for good; keeps no originals. Raises like `merge`."""
        activation.check_settled(self._ledger().lifted)
        if self._folded is None:
            check_removable(self._modules(), self.name)
            self._fold(untie=untie, keep=False)
        else:
            merging.check_alone(self._sites, self.name, keep=False)
        self._folded = None
        self._mark(merged=False)
        self.detach()

    # Files

    def save(self, path: str | Path, *, base_model: str | None = None, task_type: str | None = None) -> Path:
        """Writes the adapter in PEFT's layout, if it fits: adapter_config.json, adapter_model.safetensors, README.md.

        Args:
            path: a folder; an adapter whose name is not "default" goes into its sub-folder of that name, as PEFT's do.
                A README.md that is there already is kept.
            base_model: name or path of the base model, for those who load it.
            task_type: PEFT's task type, such as "CAUSAL_LM" or "SEQ_CLS".

        Returns:
            The folder that was written. A kill at any moment leaves the old adapter there or the new one.

        Raises:
            CheckpointError: the files cannot be written; what was there before is untouched.
            StateError: a layer was replaced after attaching.
        """
        self.check_sites("save")
        folder = Path(path) if self.name == "default" else Path(path) / self.name
        description = Description(
            method=self.method,
            sites={
                site_path: Placed(site, self._adapter(site), self._methods[site_path])
                for site_path, site in self._sites.items()
            },
            copies=self.copies,
            modules=Modules.of(self.model).aliases,
            base_model=base_model,
            task_type=task_type,
        )
        store.write(folder, description)
        return folder

    def _ledger(self) -> Ledger:
        ledger = vars(self.model).get(LEDGER)
        if not isinstance(ledger, Ledger) or self.name not in ledger.names:
            raise StateError(f"adapter {self.name!r} is not attached any more", fix="attach it again")
        return ledger
