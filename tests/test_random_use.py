"""Whatever users do between steps, in random order: after each step the optimizer is where torch's is.

Each operation below happens to both. A failure names the seed, and so the whole sequence. FUSEDOPT_CASES=all takes more
seeds.
"""

import copy
import math
import pickle
import random

import pytest
import thinning
import torch
from cases import AFTER_LOADING, KERNEL_NAMES, give_gradients, laid_out, model
from options import LR, NAMES, STATEFUL
from pairs import Pair, clip, close
from thinning import every_value

import fusedopt

IN_TORCH = [name for name in NAMES if hasattr(torch.optim, name)]
SEEDS = range(20 if thinning.ALL else 2)


class Use:
    """A pair of optimizers in the hands of a user."""

    def __init__(self, name, seed, kind, device, backend):
        self.name, self.device = name, device
        self.random = random.Random(f"{name} {seed}")
        self.pair = Pair(name, None, kind, device=device, start=seed, backend=backend, flatten=seed % 2 == 0)
        self.frozen = set()

    @property
    def sides(self):
        return (self.pair.opt, self.pair.ours), (self.pair.oracle, self.pair.theirs)

    def pick(self):
        """The number of some parameter."""
        return self.random.randrange(len(self.pair.ours))

    # What may happen

    def step(self):
        pair = self.pair
        for _, params in self.sides:
            give_gradients(params, pair.number, plain=params is pair.theirs)
            for k in self.frozen:
                params[k].grad = None
        pair.opt.step()
        clip(pair.theirs, pair.opt)
        pair.oracle.step()
        pair.number += 1

    def step_with_closure(self):
        for optimizer, params in self.sides:

            def closure(optimizer=optimizer, params=params):
                optimizer.zero_grad()
                loss = sum((p * (k % 3 + 0.5)).square().sum() for k, p in enumerate(params) if k not in self.frozen)
                loss.backward()
                if optimizer is self.pair.oracle:
                    clip(params, self.pair.opt)
                return loss

            optimizer.step(closure)

    def step_without_gradients(self):
        for optimizer, _ in self.sides:
            optimizer.zero_grad()
            optimizer.step()

    def step_with_zeros(self):
        for optimizer, _ in self.sides:
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()

    def step_with_a_bad_gradient(self):
        """Which ours skips, and torch's user leaves out."""
        pair = self.pair
        give_gradients(pair.ours, pair.number, plain=True)
        p = next(p for p in pair.ours if p.grad is not None and p.numel())
        p.grad.view(-1)[-1] = self.random.choice([math.nan, math.inf])
        before = pair.opt.skip_nonfinite
        pair.opt.skip_nonfinite = True
        pair.opt.step()
        pair.opt.skip_nonfinite = before
        for p in pair.ours + pair.theirs:
            p.grad = None
        # A parameter that had no gradient before has a state of zero steps now, as under torch's scaler.
        for p, q in zip(pair.ours, pair.theirs):
            if p in pair.opt.state and not pair.oracle.state.get(q):
                del pair.opt.state[p]

    def freeze(self):
        self.frozen ^= {self.pick()}

    def change_numbers(self):
        number = self.random.randrange(len(self.pair.opt.param_groups))
        changes = {"lr": self.random.choice([0.0, 0.01, 0.05]), "weight_decay": self.random.choice([0.0, 0.03])}
        changes["maximize"] = self.random.random() < 0.3
        changes |= self.random.choice([{}, {"eps": 1e-6}, {"momentum": 0.5}, {"betas": (0.5, 0.95)}])
        for optimizer, _ in self.sides:
            group = optimizer.param_groups[number]
            group.update({key: value for key, value in changes.items() if key in group})

    def tensor_lr(self):
        for optimizer, _ in self.sides:
            group = optimizer.param_groups[-1]
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64)

    def change_settings(self):
        opt = self.pair.opt
        opt.max_grad_norm = self.random.choice([None, None, 2.0])
        opt.max_grad_value = self.random.choice([None, None, 0.7, (None, 0.5)])
        opt.flatten = self.random.random() < 0.4

    def add_group(self):
        if len(self.pair.ours) > 60:
            return
        lr = self.random.choice([0.01, LR])
        for optimizer, params in self.sides:
            newcomers = model("tiny", device=self.device)[1:]
            optimizer.add_param_group({"params": newcomers, "lr": lr})
            params += newcomers

    def new_groups(self):
        """Other dicts with the same entries, in another order."""
        for optimizer, _ in self.sides:
            optimizer.param_groups = [dict(group) for group in reversed(optimizer.param_groups)]

    def move(self):
        for k in [self.pick() for _ in range(4)]:
            layout = self.random.choice(["", "", "transposed", "gaps"])
            for _, params in self.sides:
                p = params[k]
                p.grad = None
                p.data = laid_out(p.data, layout if p.dim() == 2 or layout != "transposed" else "")

    def write(self):
        k = self.pick()
        for _, params in self.sides:
            with torch.no_grad():
                params[k].mul_(0.9)

    def edit_state(self):
        k = self.pick()
        for optimizer, params in self.sides:
            for key, value in optimizer.state.get(params[k], {}).items():
                if key != "step" and value is not None and value.dim() and key != "square_avg":
                    value.mul_(0.5)

    def replace_state(self):
        k = self.pick()
        for optimizer, params in self.sides:
            state = optimizer.state.get(params[k], {})
            state.update({key: value.clone() for key, value in state.items() if value is not None})

    def edit_step(self):
        k = self.pick()
        for optimizer, params in self.sides:
            step = optimizer.state.get(params[k], {}).get("step")
            if step is not None and step > 0:
                step.fill_(3.0)

    def forget_state(self):
        k = self.pick()
        for optimizer, params in self.sides:
            optimizer.state.pop(params[k], None)

    def load_each_others(self):
        saved = [copy.deepcopy(optimizer.state_dict()) for optimizer, _ in self.sides]
        for (optimizer, _), other in zip(self.sides, reversed(saved)):
            optimizer.load_state_dict(other)
            for group in optimizer.param_groups:
                group["foreach"] = False

    def refused_load(self):
        saved = copy.deepcopy(self.pair.opt.state_dict())
        saved["param_groups"].append(saved["param_groups"][0])
        with pytest.raises(ValueError, match="number of parameter groups"):
            self.pair.opt.load_state_dict(saved)

    def copy_all(self):
        carry = self.random.choice([copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
        self.pair.ours, self.pair.opt = carry((self.pair.ours, self.pair.opt))
        self.pair.theirs, self.pair.oracle = carry((self.pair.theirs, self.pair.oracle))

    def convert(self):
        """Ours anew, from a torch optimizer that took over its state."""
        opt = self.pair.opt
        settings = {key: getattr(opt, key) for key in ("max_grad_norm", "max_grad_value", "flatten", "backend")}
        options = {"lr": LR, **STATEFUL[self.name]}
        theirs = getattr(torch.optim, self.name)([dict(group) for group in opt.param_groups], **options)
        theirs.load_state_dict(opt.state_dict())
        self.pair.opt = fusedopt.convert(theirs, **settings)


OTHERS = [name for name in vars(Use) if not name.startswith("_") and name not in ("step", "sides", "pick")]


def check(use, length):
    done = []
    for _ in range(length):
        operation = use.random.choice(OTHERS)
        done.append(operation)
        getattr(use, operation)()
        for _ in range(use.random.choice([1, 1, 2])):
            done.append("step")
            use.step()
        try:
            # Roundings of 60 steps, some of them magnified by cancellation in centered RMSprop.
            tolerance = max(1e-9, AFTER_LOADING[use.name])
            close(use.pair.ours, use.pair.theirs, tolerance)
            use.pair.check(tolerance)
        except AssertionError as error:
            raise AssertionError(f"after {', '.join(done)}") from error


@every_value
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", IN_TORCH)
def test_ours_is_where_torchs_is(name, seed, device):
    check(Use(name, seed, "small", device, None), length=30)


@pytest.mark.parametrize("name", [name for name in KERNEL_NAMES if name in IN_TORCH])
def test_with_kernels(name, needs_triton, device):
    check(Use(name, 0, "tiny", device, "triton"), length=15)


def test_every_optimizer_has_options_with_all_states():
    assert set(IN_TORCH) <= set(STATEFUL)
