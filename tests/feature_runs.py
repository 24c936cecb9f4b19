"""Programs of features.py at work, with one backend."""

import itertools

import torch
from features import BAD, CHANGED, LATE, LR, SCALE, SHAPES

import fusedopt


def values(shape, seed):
    """Between 0.5 and 1.5, with random signs: where directions change, roundings are magnified."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator) + 0.5
    return x * (torch.randint(2, shape, generator=generator) * 2 - 1)


class Run:
    """A program that runs, with one backend."""

    def __init__(self, program, device, backend):
        self.program = program
        dtypes = itertools.cycle(program.dtypes)
        self.params = []
        for k, shape in enumerate(SHAPES):
            p = values(shape, k).to(device, next(dtypes))
            self.params.append(torch.nn.Parameter(p.t().contiguous().t() if k == 2 else p))
        options = {"lr": LR, **program.options}
        settings = dict(program.settings)
        if program.tensor_rate:
            options["lr"] = torch.tensor(LR, dtype=torch.float64, device=device)
        if backend == "torch":  # where there are no launches to count, and nobody has to wait for anything
            settings.pop("launches", None)
            options.pop("capturable", None)
        groups = [{"params": self.params}]
        if program.second_group:
            groups = [{"params": self.params[:2]}, {"params": self.params[2:], **program.second_group}]
        self.opt = fusedopt.registry[program.name](groups, **options, **settings, backend=backend)
        self.opt.zero_grad()
        self.graph = self.scaler = None
        if program.scaler == "attributes":
            self.opt.grad_scale = torch.full((), SCALE, device=device)
            self.opt.found_inf = torch.zeros((), device=device)
        elif program.scaler is not None:
            cls = torch.amp.GradScaler if program.scaler == "torch" else fusedopt.GradScaler
            self.scaler = cls(device.type, init_scale=SCALE)
            self.scaler.scale(torch.zeros((), device=device))
        if program.releases:
            self.model = torch.nn.ParameterList(self.params)
            self.release = fusedopt.enable_gradient_release(self.model, self.opt)

    def step(self, number, capture):
        """``capture(executors)`` is a context in which a graph is captured."""
        program = self.program
        if number == CHANGED:
            if program.carries is not None:
                program.carries(self.opt)
            for key, value in program.changes.items():
                here = self.opt.param_groups[0]
                if isinstance(here[key], torch.Tensor):
                    here[key].fill_(value)
                else:
                    here[key] = value
        grads = self.gradients(number)
        if program.releases:
            sum((p * g).sum() for p, g in zip(self.params, grads) if g is not None).backward()
            self.update()
            return
        for p, g in zip(self.params, grads):
            stays = p.grad is not None and (program.captures or self.opt.flat_grads)
            p.grad = p.grad.copy_(g) if stays and g is not None else g
        if program.captures and capture is not None and number >= BAD:
            if self.graph is None:
                with capture(self.opt._engine.executors) as self.graph:
                    self.update()
            self.graph.replay()
        else:
            self.update()
        if not (program.captures or self.opt.flat_grads == "zeroed"):
            self.left = [p.grad for p in self.params]
            self.opt.zero_grad()

    def gradients(self, number):
        program, scale = self.program, 1.0
        if self.scaler is not None:
            scale = self.scaler.get_scale()
        elif program.scaler == "attributes":
            scale = SCALE
            self.opt.found_inf.fill_(number == BAD and program.bad is not None)
        grads = []
        for k, p in enumerate(self.params):
            g = values(p.shape, 100 * (number + 1) + k).to(p.device, p.dtype) * scale
            if number == BAD and program.bad is not None and k == 0:
                g[3, 2] = program.bad
            grads.append(None if program.missing and number == LATE and k == 1 else program.layout(g))
        return grads

    def update(self):
        """What stands between backward and zero_grad."""
        program, opt, scaler = self.program, self.opt, self.scaler
        if program.scaler == "ours, unscaled":
            scaler.unscale_(opt)
        if program.clips:
            scales = program.scaler in ("ours", "ours, unscaled")
            scaler.clip_grad_norm_(opt, 4.0) if scales else opt.clip_grad_norm_(4.0)
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()

    def seen(self):
        """Tensors by name."""
        opt, found = self.opt, {}
        for k, p in enumerate(self.params):
            found[f"parameter {k}"] = p.detach()
        for k, state in opt.state_dict()["state"].items():
            found |= {f"{key} {k}": value for key, value in state.items() if value is not None}
        if opt.ema_decay is not None:
            found |= {f"average {k}": a for k, a in enumerate(opt.ema_parameters())}
        found["grad_norm"], found["skipped_steps"] = opt.grad_norm, opt.skipped_steps
        if opt.track is not None:
            found |= opt.metrics._asdict()
        if opt.flat_grads == "zeroed":
            found |= {f"gradient {k}": p.grad for k, p in enumerate(self.params)}
        return {name: x for name, x in found.items() if x is not None}

    @torch.no_grad()
    def follow(self, other):
        """Go on from where another run is."""
        for p, q in zip(self.params, other.params):
            p.copy_(q)
            assert self.opt.state[p].keys() == other.opt.state[q].keys()
            for key, value in other.opt.state[q].items():
                self.opt.state[p][key].copy_(value)
            if q in other.opt._ema:
                self.opt._ema[p].copy_(other.opt._ema[q])
