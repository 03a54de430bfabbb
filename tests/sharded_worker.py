"""What the processes of test_sharded_models.py do. Each check compares a sharded run with the run of one process.

A check that fails on one process alone would leave the others waiting for it: checks never raise between two
collectives, they note what is wrong.
"""

import copy
import datetime
import time
import traceback
import warnings
from functools import partial

import torch
import torch.distributed as dist
from helpers import leaves, values
from table import CASES, IDS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.func import functional_call, grad

import biofunc as bf
from biofunc import distributions
from biofunc.noise import Noise
from biofunc.rule import as_rule

STEPS = 20
FEW = 3
PATIENCE, LIMIT = 60, 240
"""Seconds that a process waits for another, after which it fails, and seconds for all the work of one world size."""


class Notes:
    """What was found wrong, and how far sums in another order have led."""

    def __init__(self):
        self.wrong = []
        self.far = {}

    def expect(self, fact, what):
        if not fact:
            self.wrong.append(what)

    def same(self, sharded, plain, what, ulps=0):
        """Gathers every leaf and compares it with the unsharded one: bit for bit, or to so many ulps of its leaf."""
        sharded, plain = leaves(sharded), leaves(plain)
        self.expect(sharded.keys() == plain.keys(), f"{what}: structure")
        for path in sharded:
            got = sharded[path].full_tensor() if isinstance(sharded[path], DTensor) else sharded[path]
            want = plain[path]
            if got.shape != want.shape or got.dtype != want.dtype:
                self.wrong.append(f"{what}: {path} is {got.dtype} {got.shape}, not {want.dtype} {want.shape}")
                continue
            if torch.equal(got.nan_to_num(), want.nan_to_num()) and torch.equal(got.isnan(), want.isnan()):
                continue
            scale = want.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            distance = ((got - want).abs().max() / scale).item() / torch.finfo(torch.float32).eps
            self.far[what] = max(self.far.get(what, 0.0), distance)
            self.expect(distance <= ulps, f"{what}: {path} is {distance:.3g} ulps away, allowed are {ulps}")

    def placed(self, tree, like, what):
        tree, like = leaves(tree), leaves(like)
        for path, leaf in tree.items():
            mine = leaf.placements if isinstance(leaf, DTensor) else None
            theirs = like[path].placements if isinstance(like[path], DTensor) else None
            self.expect(mine == theirs, f"{what}: {path} is placed {mine}, not {theirs}")

    def refused(self, work, error, words, what):
        try:
            work()
        except error as raised:
            self.expect(words in str(raised), f"{what}: says {raised}")
        else:
            self.wrong.append(f"{what}: was not refused")


def layout(world):
    """Shape and placement of each leaf: every kind of placement in one tree, with uneven and empty shards."""
    line = init_device_mesh("cpu", (world,))
    found = {
        "rows": ((7, 5), line, [Shard(0)]),
        "columns": ((7, 5), line, [Shard(1)]),
        "few": ((3, 9), line, [Shard(0)]),
        "bias": ((7,), line, [Shard(0)]),
    }
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        found |= {
            "grid": ((7, 5), grid, [Shard(0), Shard(1)]),
            "hybrid": ((7, 5), grid, [Replicate(), Shard(0)]),
            "twice": ((9, 4), grid, [Shard(0), Shard(0)]),
            "kernel": ((4, 6, 2), grid, [Shard(1), Shard(0)]),
            "strided": ((8, 5), grid, [_StridedShard(0, split_factor=2), Shard(0)]),
        }
        if torch.__version__ >= (2, 13):  # before, torch cannot gather such a leaf
            found["woven"] = ((8, 5), grid, [_StridedShard(0, split_factor=2), Replicate()])
    else:
        found |= {"kernel": ((6, 3, 2, 2), line, [Shard(1)]), "whole": ((4, 3), line, [Replicate()])}
    return found


def shard(plain, places):
    return {p: distribute_tensor(w, *places[p][1:], src_data_rank=None) for p, w in plain.items()}


class Data:
    """The same parameters and gradients, sharded and plain."""

    def __init__(self, world):
        self.places = layout(world)
        self.plain = {path: 0.3 * values(1, shape, name=path) for path, (shape, _, _) in self.places.items()}
        self.sharded = shard(self.plain, self.places)
        grads = [
            {path: 0.1 * values(step, shape, name=path + " gradient") for path, (shape, _, _) in self.places.items()}
            for step in range(STEPS)
        ]
        self.grads = [(g, shard(g, self.places)) for g in grads]
        self.activity = {
            path: values(9, shape[:1], name=path + " activity").abs()
            for path, (shape, _, _) in self.places.items()
            if len(shape) > 1
        }

    def run(self, learn, steps=STEPS, sharded=True, where=None, **signals):
        """Gradients that depend on the weights, elementwise."""
        params = self.sharded if sharded else self.plain
        state = first = learn.init(params, bf.random.key(3), where=where)
        for step in range(steps):
            grads = {path: g + 0.1 * params[path] for path, g in self.grads[step][sharded].items()}
            params, grads, state = learn(params, grads, state, **signals)
        return first, (params, grads, state)


def in_chain(rule):
    """A chain in which a rule of the table learns."""
    if rule.phase in ("descend", "weights"):
        return bf.chain(*[bf.descend(0.1)][: rule.phase == "weights"], rule)
    return bf.chain(rule, *[partial(bf.fuzzy_learning_rates, nu=0)][: rule.writes_rates], bf.descend(0.1))


REDUCING = 32
"""Float32 ulps of a leaf's largest value that rules with means over a leaf may be away after 20 steps: partial sums are
added in another order, which moves a mean by an ulp or two, and each step carries that on. 1.9 were seen."""


def rules(notes, data):
    for (row, settings), name in zip(CASES, IDS, strict=True):
        if settings and not row.reduces and len(data.places) > 6:  # four processes take their time
            continue
        rule, signals = row.make(**settings), {}
        if row.given in ("activity_dependent_rates", "synaptic_scaling"):  # handed over here, as users do
            rule, signals = as_rule(partial(getattr(bf, row.given), **settings)), {"activity": data.activity}
        if rule.once:
            once(notes, data, rule, name)
            continue
        steps = FEW if settings else STEPS
        (first, sharded), (_, plain) = [data.run(in_chain(rule), steps, way, **signals) for way in (True, False)]
        notes.same(sharded, plain, name, REDUCING if row.reduces else 0)
        notes.placed(sharded[0], data.sharded, name)
        notes.placed(sharded[1], data.sharded, name)
        notes.placed(sharded[2], first, name)
        for path, leaf in leaves(first).items():
            param = next((p for p in data.sharded if path.endswith(f"/{p}")), None)
            if param and leaf.shape == data.sharded[param].shape:
                notes.placed({param: leaf}, {param: data.sharded[param]}, f"{name}: {path}")
        untouched(notes, data, rule, name, signals)


def once(notes, data, rule, name):
    results = []
    for params in (data.sharded, data.plain):
        state = bf.init(params, bf.random.key(3), rule)
        results.append(rule(params, params, state))
    notes.same(*results, name)
    notes.placed(results[0][0], data.sharded, name)


def untouched(notes, data, rule, name, signals):
    grads = data.grads[0][1]
    state = bf.init(data.sharded, bf.random.key(3), rule)
    params, directions, _ = rule(data.sharded, grads, state, **signals)
    if rule.phase not in ("descend", "weights"):
        notes.expect(all(params[p] is data.sharded[p] for p in params), f"{name}: params are other objects")
    if rule.phase in ("descend", "weights", "gradient"):
        notes.expect(all(directions[p] is grads[p] for p in grads), f"{name}: grads are other objects")
    if not rule.every_leaf:
        notes.expect(params["bias"] is data.sharded["bias"], f"{name}: another bias")
        notes.expect(directions["bias"] is grads["bias"], f"{name}: another gradient of the bias")


def draws(notes, data):
    """A shard of each draw is the slice of the unsharded draw; float64 has two words per element."""
    keys = {path: bf.random.fold_in(bf.random.key(5), path) for path in data.plain}
    kinds = ("normal", "uniform", "coin", "uniform")
    sharded, plain = [Noise(keys).draw(params, *kinds) for params in (data.sharded, data.plain)]
    notes.same(sharded, plain, "noise.draw")
    functions = {
        "uniform": bf.random.uniform,
        "uniform float64": partial(bf.random.uniform, dtype=torch.float64),
        "uniform bfloat16": partial(bf.random.uniform, dtype=torch.bfloat16),
        "normal": bf.random.normal,
        "bernoulli": partial(bf.random.bernoulli, p=0.3),
        "rademacher": bf.random.rademacher,
        "gamma": partial(bf.random.gamma, concentration=0.7),
        "beta": partial(bf.random.beta, a=0.7, b=2.0),
    }
    for name, function in functions.items():
        sharded = {path: function(keys[path], like=w) for path, w in data.sharded.items()}
        plain = {path: function(keys[path], shape=w.shape) for path, w in data.plain.items()}
        notes.same(sharded, plain, name)
        notes.placed(sharded, data.sharded, name)
    concentrations = {path: 0.1 + w.abs() for path, w in data.sharded.items()}
    sharded = {path: bf.random.gamma(keys[path], c, like=c) for path, c in concentrations.items()}
    plain = {path: bf.random.gamma(keys[path], 0.1 + w.abs()) for path, w in data.plain.items()}
    notes.same(sharded, plain, "gamma of concentrations")

    def own(key, weight, nu, path):  # draws the whole leaf, as one written without sharding in mind does
        return 1 + nu * bf.random.normal(key, weight.shape)

    for distribution in (*distributions.NAMED, bf.distributions.layer_adaptive(list(data.plain)), own):
        rule = partial(bf.fuzzy_learning_rates, nu=0.4, distribution=distribution)
        sharded, plain = [bf.init(params, bf.random.key(5), rule) for params in (data.sharded, data.plain)]
        # weight_adaptive divides by the mean size
        notes.same(sharded, plain, f"distribution {distribution}", 4 if distribution == "weight_adaptive" else 0)
        notes.placed(sharded.plasticity, {path: data.sharded[path] for path in sharded.plasticity}, f"{distribution}")


def composition(notes, data):
    """A whole chain, selections and periods."""
    learn = bf.chain(
        partial(bf.crystallize, recovery=0.1),
        bf.adam(),
        bf.where("[rw]*", partial(bf.volume_dependent_lr, normalise=True)),
        partial(bf.fuzzy_learning_rates, nu=0.5),
        bf.descend(bf.schedules.cosine(0.05, 0.0, STEPS)),
        bf.every(3, partial(bf.rejuvenate_weights, rate=0.2)),
        partial(bf.enforce_dales_principle, axis={"kernel": (1, 2), "few": (0, 1)}),
    )
    (first, sharded), (_, plain) = [data.run(learn, sharded=way) for way in (True, False)]
    notes.same(sharded, plain, "chain", REDUCING)
    notes.placed(sharded[0], data.sharded, "chain")
    notes.placed(sharded[2], first, "chain")
    learn = bf.chain(bf.sgd(momentum=0.9), bf.where("bias", bf.descend(0.1)))
    (_, sharded), (_, plain) = [data.run(learn, FEW, way, where="*i*") for way in (True, False)]
    notes.same(sharded, plain, "selection")
    notes.expect(sharded[0]["rows"] is data.sharded["rows"], "selection: another leaf moved")

    @bf.rule(phase="weights")
    def shares(params, grads, state, *, noise):
        """One of a user's own, written without sharding in mind: it reduces, and returns whole tensors."""
        (z,) = noise.draw(params, "normal")
        means = {path: w.double().mean() for path, w in params.items()}
        moved = {path: (w - means[path]).to(w.dtype) + 0.01 * z[path] for path, w in params.items()}
        return moved, grads, state

    (_, sharded), (_, plain) = [data.run(bf.chain(shares), FEW, way) for way in (True, False)]
    notes.same(sharded, plain, "a rule of one's own", 16)
    notes.placed(sharded[0], data.sharded, "a rule of one's own")


def measures(notes, data):
    learn = bf.chain(bf.crystallize, bf.fuzzy_learning_rates, bf.descend(0.5), bf.rejuvenate_weights)
    stacked = [path for path in data.plain if path != "strided" or torch.__version__ >= (2, 13)]  # torch mixes it up
    results = []
    for way in (True, False):
        first = data.sharded if way else data.plain
        _, (last, _, state) = data.run(learn, 3, way)
        results.append(
            {
                "turnover": bf.measure.turnover(first, last),
                "survival": bf.measure.survival(
                    bf.ensemble.stack([{path: tree[path] for path in stacked} for tree in (first, last)])
                ),
                "sign_balance": bf.measure.sign_balance(last),
                "consistency": bf.measure.dale_consistency(last),
                "skew": bf.measure.log_weight_skew(last),
                "kurtosis": bf.measure.log_weight_kurtosis(last),
                "crystallised": bf.measure.crystallised_fraction(state, below=0.9),
                "spectrum": bf.measure.rate_spectrum(state),
                "spectrum of rates": bf.measure.rate_spectrum(state.plasticity["rows"]),
                "effective_number": bf.measure.effective_number_of_rates(state),
                "dead": bf.measure.dead_unit_fraction({"rows": last["rows"].abs()}, threshold=0.01),
                "rank": bf.measure.effective_rank(last["rows"]),
                "penalty": bf.l1_penalty(last),
                # one loss lives on one mesh
                "slope": grad(bf.l1_penalty)({path: last[path] for path in ("rows", "columns", "few", "bias")}),
            }
        )
    notes.expect(not any(isinstance(leaf, DTensor) for leaf in leaves(results[0]["consistency"]).values()), "measures")
    notes.same(*results, "measures", REDUCING)  # the weights differ by what the means of crystallize do


def refusals(notes, data, world):
    params, key = data.sharded, bf.random.key(0)
    grads = dict(data.grads[0][1])
    state = bf.init(params, key, bf.crystallize)
    if world > 1:
        inside = grad(lambda w: bf.random.normal(key, like=w).sum())
        notes.refused(lambda: inside(params["rows"]), TypeError, "inside grad", "grad")
        mesh = params["rows"].device_mesh
        part = data.grads[0][0]["rows"] / world  # exact for 2 and 4
        pending = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        _, moved, _ = bf.crystallize(params, {**grads, "rows": pending}, state)
        notes.same(moved, data.grads[0][0], "partial gradients")
        notes.placed(moved, params, "partial gradients")
        notes.refused(lambda: bf.init({"rows": pending}, key), ValueError, "'rows' is a DTensor with", "partial params")
    bare = {**grads, "rows": data.grads[0][0]["rows"]}
    notes.refused(lambda: bf.crystallize(params, bare, state), TypeError, "grads leaf 'rows' is a plain", "plain grads")
    notes.refused(
        lambda: bf.crystallize(data.plain, data.grads[0][0], state), TypeError, "state has DTensors", "plain params"
    )
    if world == 4:
        other = {**grads, "rows": grads["hybrid"]}
        notes.refused(lambda: bf.crystallize(params, other, state), ValueError, "lies on the mesh", "another mesh")
    mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    fully_shard(mlp[0], mesh=init_device_mesh("cpu", (world,)))
    for name, work in {
        "convert": lambda: bf.convert(mlp),
        "record_activity": lambda: bf.record_activity(mlp),
        "split_synapses": lambda: bf.split_synapses(mlp),
        "make_model": lambda: bf.ensemble.init(lambda: mlp, [0]),
    }.items():
        notes.refused(work, TypeError, f"{name}: layer '0' of the model is wrapped by FSDP", name)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))


X, Y = values(0, (16, 6), name="x"), values(0, (16, 2), name="y")

ATTACHED = {
    "gradient": [bf.crystallize],
    "update": [partial(bf.fuzzy_learning_rates, nu=0.4)],
    "weight": [bf.every(2, bf.rejuvenate_weights), bf.synaptic_scaling],
}


def train(model, make_optimizer, steps=FEW):
    optimizer = make_optimizer(model.parameters())
    attached = bf.attach(optimizer, model, key=bf.random.key(1), where="*.weight", **ATTACHED)
    activity = {f"{i}.weight": values(i, (n,), name="activity").abs() for i, n in ((0, 8), (2, 5), (4, 2))}
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), Y).backward()
        attached.signal(activity=activity)
        optimizer.step()
    return {path: p.detach() for path, p in model.named_parameters()}, attached


def modules(notes, world):
    """All processes see the same batch, so that the mean over them is the gradient of one."""
    makers = {
        "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "Adam": partial(torch.optim.Adam, lr=0.01),
        "AdamW, foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True),
    }
    for name, make in makers.items():
        model = network()
        for layer in (*[m for m in model if isinstance(m, nn.Linear)], model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
        params, attached = train(model, make)
        wanted, reference = train(network(), make)
        # The matrix products of a shard are those of the whole layer; their gradients are averaged over the processes
        notes.same(params, wanted, f"fully_shard {name}", REDUCING)
        notes.same(attached.state, reference.state, f"state of fully_shard {name}", REDUCING)
        attached.load_state_dict(reference.state_dict())
        notes.placed(attached.state.plasticity, params, f"a loaded state of fully_shard {name}")
    if world == 4 and torch.__version__ >= (2, 13):  # before, torch cannot gather leaves that are cut so
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        model = network()
        parallelize_module(model, grid["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=grid["data"])
        params, attached = train(model, makers["Adam"])
        placements = [type(p).__name__ for p in params["0.weight"].placements]
        notes.expect("_StridedShard" in placements, f"torch made no strided shard but {placements}")
        notes.same(params, train(network(), makers["Adam"])[0], "fully_shard and tensor parallel", REDUCING)
    if world > 1:
        key = bf.random.key(dist.get_rank())
        model = fully_shard(network(), mesh=init_device_mesh("cpu", (world,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach = partial(bf.attach, optimizer, model, key=key, weight=[bf.rejuvenate_weights])
        notes.refused(attach, ValueError, "has another key", "ranks with other keys")


def functions(notes, world):
    """`functional_call` on a module that was not wrapped, with the parameters that FSDP made."""
    skeleton, mesh = network(), init_device_mesh("cpu", (world,))
    sharded = fully_shard(copy.deepcopy(skeleton), mesh=mesh)
    params = {path: p.detach() for path, p in sharded.named_parameters()}
    x, y = [DTensor.from_local(t, mesh, [Replicate()], run_check=False) for t in (X, Y)]
    learn = bf.chain(
        bf.crystallize, bf.adam(), bf.fuzzy_learning_rates, bf.descend(0.01), bf.every(2, bf.rejuvenate_weights)
    )

    def step(params, state, x, y):
        # Not mse_loss: torch multiplies its gradients by the number of processes when the output is sharded
        slopes = grad(lambda p: (functional_call(skeleton, p, (x,)) - y).square().mean())(params)
        params, _, state = learn(params, slopes, state)
        return params, state

    plain = {path: p.detach() for path, p in skeleton.named_parameters()}
    got, wanted = [(params, learn.init(params, bf.random.key(2))) for params in (params, plain)]
    for _ in range(FEW):
        got, wanted = step(*got, x, y), step(*wanted, X, Y)
    notes.same(got, wanted, "functional_call", 2 * REDUCING)  # the products of matrices are sums over shards, too
    notes.placed(got[0], params, "functional_call")


def compiled(notes, data, world):
    if world != 2:
        return
    some = ("columns",)  # a rule that draws and reduces: compiling is slow
    learn = bf.chain(partial(bf.volume_dependent_lr, normalise=True), bf.descend(0.1))
    fast = torch.compile(learn, backend="aot_eager", fullgraph=True)
    results = []
    for do, way in ((fast, True), (learn, False)):
        params = {path: (data.sharded if way else data.plain)[path] for path in some}
        state = learn.init(params, bf.random.key(3))
        for step in range(FEW):
            params, grads, state = do(params, {path: data.grads[step][way][path] for path in some}, state)
        results.append((params, grads, state))
    notes.same(*results, "compiled", REDUCING)
    notes.placed(results[0][0], data.sharded, "compiled")


def work(rank, world, folder, checks=()):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # Of torch's own making: with FSDP2 on top of tensor parallelism, and on one old Python
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
    dist.init_process_group(
        "gloo", f"file://{folder}/store", datetime.timedelta(seconds=PATIENCE), world_size=world, rank=rank
    )
    notes, seconds = Notes(), {}
    try:
        data = Data(world)
        for check in checks or CHECKS:
            start = time.process_time()
            CHECKS[check](notes, data, world)
            seconds[check] = round(time.process_time() - start, 1)
    except BaseException:
        notes.wrong.append(traceback.format_exc())
    torch.save({"wrong": notes.wrong, "far": notes.far, "seconds": seconds}, f"{folder}/{rank}.pt")
    if not notes.wrong:
        dist.barrier()
    dist.destroy_process_group()


CHECKS = {
    "draws": lambda notes, data, world: draws(notes, data),
    "rules": lambda notes, data, world: rules(notes, data),
    "composition": lambda notes, data, world: composition(notes, data),
    "measures": lambda notes, data, world: measures(notes, data),
    "refusals": refusals,
    "modules": lambda notes, data, world: modules(notes, world),
    "functions": lambda notes, data, world: functions(notes, world),
    "compiled": compiled,
}
