"""Training: the loss, one step, the average, and runs that can be stopped."""
import json
import math
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from eo_ddpm import training
from eo_ddpm.forward import add_noise
from eo_ddpm.runs import fingerprint, latest_checkpoint, list_checkpoints, read_epochs, read_metrics
from eo_ddpm.schedules import get_schedule
from eo_ddpm.store import read_seal
from eo_ddpm.training import (OBJECTIVES, TrainConfig, advance, batch_index, copy_weights, diffusion_loss, draw_noise, fit,
                              held_loss, load_checkpoint, load_run, loss_weight, lr_factor, new_state, pick_precision,
                              predict_x0, read_config, record_graph, seconds_per_step, step_generator, target_for,
                              train_step, update_ema)
from eo_ddpm.unet import UNet

NET = dict(dim=8, dim_mults=[1], patch=2, attention=["none"])
CONFIG = TrainConfig(model=NET, T=50, size=8, batch_size=4, epochs=3, steps_per_epoch=2, lr=1e-3, warmup=2,
                     precision="float32", seed=1)
PIXELS = torch.randint(256, (6, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def run(folder, config=CONFIG, **kwargs):
    "A tiny run on the CPU."
    return fit(config, kwargs.pop("pixels", PIXELS), folder, device="cpu", progress=False, **kwargs)


def grey(model, schedule, epoch):
    "Stands in for a sampler; uses up global randomness, as a careless one would."
    return 0*torch.rand(5, 3, 8, 8)


FILES = ("ema", "model", "optimizer")

def parts(folder):
    "All numbers of the newest checkpoint, by name."
    folder = latest_checkpoint(folder)
    numbers = {f"{name}.{k}": v for name in FILES for k, v in load_file(folder/f"{name}.safetensors").items()}
    return numbers | {"step": torch.tensor(read_seal(folder)["step"])}


def assert_same(a, b):
    "Equal to the last bit."
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "Six steps in one go."
    folder = tmp_path_factory.mktemp("runs")/"unbroken"
    run(folder, on_epoch=grey)
    return folder


# the loss

class Net(nn.Module):
    "Our U-Net, called as the oracle calls its own."
    channels, out_dim, self_condition = 3, 3, False

    def __init__(self):
        super().__init__()
        self.net = UNet(**NET)

    def forward(self, x, t, x_self_cond=None): return self.net(x, t)


def oracle(lucidrains, net, objective, min_snr, schedule="cosine"):
    return lucidrains.GaussianDiffusion(net, image_size=8, timesteps=200, objective=f"pred_{objective}",
                                        beta_schedule=schedule, min_snr_loss_weight=min_snr)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("min_snr", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_the_oracles(lucidrains, objective, min_snr, schedule):
    "Catches a wrong target, a wrong weight, a weight applied after the mean over patches, sum instead of mean."
    net, x0 = Net(), torch.rand(6, 3, 8, 8)*2-1
    theirs, (t, noise) = oracle(lucidrains, net, objective, min_snr, schedule), draw_noise(x0, 200)
    ours = diffusion_loss(net, x0, t, noise, get_schedule(schedule, 200), objective, "min_snr" if min_snr else "noise")
    torch.testing.assert_close(ours, theirs.p_losses(x0, t, noise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_plain_loss_is_the_mean_squared_error(objective):
    "Catches a weight that sneaks into `plain`: the report's loss is the bare MSE."
    net, x0, schedule = Net(), torch.rand(6, 3, 8, 8)*2-1, get_schedule("cosine", 200)
    t, noise = draw_noise(x0, 200)
    ours = diffusion_loss(net, x0, t, noise, schedule, objective)
    a, b = (c[t].view(-1, 1, 1, 1) for c in (schedule.alphas_cumprod.sqrt(), (1-schedule.alphas_cumprod).sqrt()))
    target = {"noise": noise, "x0": x0, "v": a*noise - b*x0}[objective]
    torch.testing.assert_close(ours, (net(a*x0 + b*noise, t)-target).square().mean())


@pytest.mark.parametrize("min_snr", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_are_the_oracles(lucidrains, objective, min_snr):
    "Catches m/snr where m*snr belongs, and a cap other than 5, at every step."
    theirs = oracle(lucidrains, Net(), objective, min_snr).loss_weight
    ours = loss_weight(objective, "min_snr" if min_snr else "noise", get_schedule("cosine", 200).snr)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_predict_x0_is_the_oracles(lucidrains):
    "Catches a swapped sqrt(abar) and sqrt(1-abar), or a sign, in the way back."
    theirs, schedule = oracle(lucidrains, Net(), "v", False), get_schedule("cosine", 200)
    t = torch.tensor([0, 3, 60, 120, 180])
    xt, output = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    for objective, predict in dict(noise=theirs.predict_start_from_noise, v=theirs.predict_start_from_v).items():
        ours = predict_x0(objective, output, xt, t, schedule.alphas_cumprod)
        torch.testing.assert_close(ours, predict(xt, t, output), rtol=1e-4, atol=1e-4)
    assert predict_x0("x0", output, xt, t, schedule.alphas_cumprod) is output


@settings(max_examples=40, deadline=None)
@given(objective=st.sampled_from(OBJECTIVES), name=st.sampled_from(["linear", "cosine", "sigmoid"]),
       t=st.integers(0, 499), seed=st.integers(0, 2**31))
def test_right_answer_leads_back_to_x0(objective, name, t, seed):
    "Catches target_for and predict_x0 that do not belong together, at any step of any schedule."
    g = torch.Generator().manual_seed(seed)
    abar = get_schedule(name, 500).exact["alphas_cumprod"]
    x0, noise = torch.rand(2, 3, 4, 4, generator=g, dtype=torch.float64)*2-1, torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64)
    timesteps = torch.full((2,), t)
    target = target_for(objective, x0, noise, timesteps, abar)
    back = predict_x0(objective, target, add_noise(x0, noise, timesteps, abar), timesteps, abar)
    torch.testing.assert_close(back, x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighting", ["noise", "min_snr"])
def test_weighted_objectives_cost_the_same(weighting):
    "One x0 error, three questions: with a weighting other than plain all cost the same. Catches one wrong weight."
    schedule = get_schedule("cosine", 100)
    abar, snr = schedule.exact["alphas_cumprod"], schedule.exact["snr"]
    t = torch.arange(100)
    x0, wrong = torch.randn(2, 100, 3, 4, 4, dtype=torch.float64)
    xt = add_noise(x0, torch.randn_like(x0), t, abar)
    a, b = abar.sqrt().view(-1, 1, 1, 1), (1-abar).sqrt().view(-1, 1, 1, 1)
    answers = {"noise": lambda x0: (xt-a*x0)/b, "x0": lambda x0: x0, "v": lambda x0: (a*xt-x0)/b}
    mse = {o: (answer(wrong)-answer(x0)).square().mean((1, 2, 3)) for o, answer in answers.items()}
    costs = [loss_weight(o, weighting, snr)*mse[o] for o in OBJECTIVES]
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-6, atol=0)


def test_timesteps_cover_all_steps():
    "Catches randint(1, T) or randint(T-1): the first or last step would never be trained."
    timesteps, noise = draw_noise(torch.zeros(400, 1, 2, 2), 8)
    assert set(timesteps.tolist()) == set(range(8)) and noise.shape == (400, 1, 2, 2)


# one step

class Plain(nn.Sequential):
    "A network without norms: no gradient is so near 0 that AdamW blows up its rounding."
    def __init__(self): super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    def forward(self, xt, timesteps): return super().forward(xt)


def test_train_step_is_adamw_by_hand():
    "Two steps with clipping. Forgetting zero_grad differs in the second; clipping after the step, or never, in both."
    model, by_hand, schedule = Plain(), Plain(), get_schedule("cosine", 50)
    by_hand.load_state_dict(model.state_dict())
    optimizer, reference = (torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=.1) for m in (model, by_hand))
    g, h, clip = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5), .05
    for _ in range(2):
        x0 = torch.rand(4, 3, 8, 8)*2-1
        loss, norm = train_step(model, optimizer, x0, schedule, clip=clip, generator=g)
        t, noise = torch.randint(50, (4,), generator=h), torch.randn(x0.shape, generator=h)
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        expected = (by_hand(abar.sqrt()*x0 + (1-abar).sqrt()*noise, t)-noise).square().mean()
        gradients = torch.autograd.grad(expected, list(by_hand.parameters()))
        length = torch.cat([d.flatten() for d in gradients]).norm()
        for p, d in zip(by_hand.parameters(), gradients): p.grad = d*clip/(length+1e-6)
        reference.step()
        torch.testing.assert_close((loss, norm), (expected.detach(), length), rtol=1e-4, atol=1e-6)
        assert norm > clip
    for p, q in zip(model.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_gradients_left_over_do_not_count():
    "The planted fault itself: a gradient that lies around from before must not change the step."
    schedule, x0 = get_schedule("cosine", 50), torch.rand(4, 3, 8, 8)
    clean = UNet(**NET)
    dirty = UNet(**NET)
    dirty.load_state_dict(clean.state_dict())
    for p in dirty.parameters(): p.grad = torch.full_like(p, 100.)
    for model in (clean, dirty):
        train_step(model, torch.optim.SGD(model.parameters(), .1), x0, schedule, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(p, q) for p, q in zip(clean.parameters(), dirty.parameters()))


def test_bfloat16_keeps_weights_and_loss_in_float32():
    "Catches weights cast to 16 bits, where small steps vanish, and a loss averaged in 16 bits."
    x0, schedule, losses = torch.rand(4, 3, 8, 8), get_schedule("cosine", 50), {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = UNet(**NET)
        losses[precision], _ = train_step(model, torch.optim.AdamW(model.parameters()), x0, schedule,
                                          precision=precision, generator=torch.Generator().manual_seed(0))
        assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert losses["bfloat16"].dtype == torch.float32 and losses["bfloat16"] != losses["float32"]
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=.02, atol=0)


def test_pick_precision():
    "Catches an answer other than the two, and an explicit wish that is overruled."
    assert pick_precision("cpu") in ("float32", "bfloat16")
    assert pick_precision("cpu", "bfloat16") == "bfloat16" and pick_precision("cpu", "float32") == "float32"
    with pytest.raises(ValueError, match="unknown precision 'half'"): pick_precision("cpu", "half")


# average and learning rate

def test_ema_by_hand():
    "Catches decay and 1-decay swapped, a first update that mixes in the start, and a missing warm-up or cap."
    model = nn.Linear(1, 1, bias=False)
    ema, expected = copy_weights(model), None
    for n, value in enumerate([4., 2., 8., -1., 3., 5.]*4):
        nn.init.constant_(model.weight, value)
        update_ema(ema, model, n, .5)
        decay = min(.5, (1+n)/(10+n))
        expected = value if n == 0 else decay*expected + (1-decay)*value
        assert ema.weight.item() == pytest.approx(expected, rel=1e-5)
    assert (1+8)/(10+8) == .5  # the cap is reached on the way: both branches were tried


def test_ema_is_torchs():
    "Another hand: torch's own AveragedModel with the same decays, over all weights of a network."
    model = UNet(**NET)
    ema, n = copy_weights(model), [0]
    def lerp(average, weight, count): return torch.lerp(average, weight, 1-min(.9, (1+n[0])/(10+n[0])))
    theirs = AveragedModel(model, avg_fn=lerp)
    for n[0] in range(12):
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn_like(p))
        update_ema(ema, model, n[0], .9)
        theirs.update_parameters(model)
    for p, q in zip(ema.parameters(), theirs.module.parameters()): torch.testing.assert_close(p, q)


def test_ema_is_a_network_of_its_own():
    "Catches an average that shares memory with the model, wants gradients, or stays in training mode."
    model = UNet(**NET)
    ema = copy_weights(model)
    update_ema(ema, model, 0)
    assert all(torch.equal(p, q) and p.data_ptr() != q.data_ptr() for p, q in zip(model.parameters(), ema.parameters()))
    assert not any(p.requires_grad for p in ema.parameters()) and all(p.requires_grad for p in model.parameters())
    assert not ema.training and model.training


def test_lr_factor_by_hand():
    "Catches a rise that starts at 0 (a wasted step), a peak that is skipped, and a cosine over the wrong length."
    points = {0: .1, 4: .5, 9: 1, 10: 1, 55: .5, 100: 0, 200: 0}
    for step, factor in points.items(): assert lr_factor(step, 10, 100) == pytest.approx(factor, abs=1e-12)
    assert lr_factor(40, 10, 100) == pytest.approx(.75)  # a third of the way: half of 1 + cos 60
    assert lr_factor(0, 0, 10) == 1


@settings(max_examples=60, deadline=None)
@given(warmup=st.integers(0, 300), total=st.integers(1, 300))
def test_lr_factor_rises_then_falls(warmup, total):
    "Catches a division by 0, a factor outside [0,1], and a short run whose warm-up never ends."
    factors = [lr_factor(i, warmup, total) for i in range(total)]
    peak = factors.index(max(factors))
    assert min(factors) >= 0 and max(factors) == 1
    assert factors[:peak+1] == sorted(factors[:peak+1]) and factors[peak:] == sorted(factors[peak:], reverse=True)


# chance

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 99))
def test_every_patch_once_a_round(n, batch_size, seed):
    "Catches patches left out at the end of a round, for sizes that do not divide, and batches larger than the data."
    drawn = torch.cat([batch_index(n, batch_size, step, seed) for step in range(-(-3*n//batch_size))])[:3*n]
    assert drawn.dtype == torch.int64
    for one_round in drawn.view(3, n): assert sorted(one_round.tolist()) == list(range(n))


def test_rounds_and_seeds_differ():
    "Catches an order drawn once and repeated in every round."
    orders = [batch_index(30, 30, step, seed).tolist() for step, seed in ((0, 0), (1, 0), (2, 0), (0, 1))]
    assert len({tuple(o) for o in orders}) == 4


def test_step_generator_has_no_history():
    "Catches a stream shared between steps, seed and step added up, and use of the global stream."
    draw = lambda seed, step: torch.randn(4, generator=step_generator(seed, step)).tolist()
    before = torch.get_rng_state()
    assert draw(0, 7) == draw(0, 7)
    assert len({tuple(draw(seed, step)) for seed in range(5) for step in range(5)}) == 25
    assert torch.equal(before, torch.get_rng_state())


def test_new_state_depends_on_its_seed_alone():
    "Catches weights that depend on what ran before, and a caller's randomness that is disturbed."
    first = new_state(CONFIG)
    torch.rand(7)
    before = torch.get_rng_state()
    second, other = new_state(CONFIG), new_state(replace(CONFIG, seed=2))
    assert torch.equal(before, torch.get_rng_state())
    same, different = (list(zip(first.model.parameters(), s.model.parameters())) for s in (second, other))
    assert all(torch.equal(p, q) for p, q in same) and not all(torch.equal(p, q) for p, q in different)


def test_quiet_start_still_learns():
    "Catches a network that answers noise at first, and zeros that no gradient ever gets past."
    state, schedule = new_state(replace(CONFIG, weight_decay=0., warmup=0)), get_schedule("cosine", 50)
    assert not state.model(torch.randn(2, 3, 8, 8), torch.tensor([0, 49])).any()
    before = {name: p.clone() for name, p in state.model.named_parameters()}
    for _ in range(6): training.advance(state, CONFIG, PIXELS, schedule, 100, "float32")
    stuck = [name for name, p in state.model.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in stuck if not name.endswith(".conv.bias")]  # group norm takes these away again


# config

@pytest.mark.parametrize("change, message", [
    (dict(objective="eps"), "unknown objective 'eps'"), (dict(weighting="snr"), "unknown weighting 'snr'"),
    (dict(precision="fp16"), "unknown precision 'fp16'"), (dict(schedule="square"), "unknown schedule 'square'"),
    (dict(flips="up"), "unknown flips 'up'"), (dict(schedule="linear", T=20), "T = 20"), (dict(T=0), "T = 0"),
    (dict(size=0), "size = 0"), (dict(size=9), "size = 9: this network needs a multiple of 2"), (dict(batch_size=0), "batch_size = 0"),
    (dict(epochs=0), "epochs = 0"), (dict(lr=0.), "lr = 0.0"), (dict(lr=math.nan), "lr = nan"), (dict(clip=-1.), "clip = -1.0"),
    (dict(steps_per_epoch=-1), "steps_per_epoch = -1"), (dict(warmup=-1), "warmup = -1"), (dict(seed=-1), "seed = -1"),
    (dict(ema=1.), "ema = 1.0"), (dict(model=dict(NET, attention=["best"])), "unknown attention"),
])
def test_config_names_what_cannot_be(change, message):
    "Catches a value that would fail late, or train nonsense in silence."
    with pytest.raises(ValueError, match=message.replace(".", r"\.")): replace(CONFIG, **change)


@pytest.mark.parametrize("pixels, message", [
    (PIXELS.float(), "torch.float32, expected a uint8"), (PIXELS.numpy(), "expected a uint8"),
    (PIXELS[:, :2], r"expected \(N,3,H,W\)"), (PIXELS[0], r"expected \(N,3,H,W\)"), (PIXELS[:0], r"expected \(N,3,H,W\)"),
    (PIXELS[..., :7], "12 x 7 are smaller than the crop, 8"),
])
def test_pixels_that_do_not_fit(pixels, message, tmp_path):
    "Catches data on the wrong scale or with the wrong bands; and a folder left behind by a run that never began."
    with pytest.raises(ValueError, match=message): run(tmp_path/"run", pixels=pixels)
    assert not (tmp_path/"run").exists()


# runs

def test_run_folder(unbroken):
    "Catches a run that ends well and leaves a part out, or numbers that are not finite."
    assert sorted(p.name for p in unbroken.iterdir() if p.name != ".lock") == ["checkpoints", "config.json", "epochs.csv",
                                                                               "metrics.csv", "samples", "tensorboard"]
    assert sorted(p.name for p in (unbroken/"samples").iterdir()) == [f"epoch_00{i}.png" for i in (1, 2, 3)]
    assert (unbroken/"metrics.csv").read_text(encoding="utf-8").splitlines()[0] == "step,loss,grad_norm,lr,seconds"
    rows = read_metrics(unbroken)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) and value > 0 for row in rows for value in row.values())
    for row, factor in zip(rows, [.5, 1, 1, .8535534, .5, .1464466]): assert row["lr"] == pytest.approx(1e-3*factor, rel=1e-5)


def test_config_json_says_where_a_run_came_from(unbroken):
    "Catches a run that nobody can repeat: a setting, the seed, the versions or the device are missing."
    info = json.loads((unbroken/"config.json").read_text(encoding="utf-8"))
    assert read_config(unbroken) == CONFIG and info["config"]["seed"] == 1
    assert info["precision_used"] == "float32" and info["machine"]["device"].startswith("cpu")
    assert {"eo_ddpm", "torch", "numpy", "python", "threads", "git_commit"} <= info["machine"].keys()
    assert info["fingerprints"] == dict(data=fingerprint(PIXELS), held=None) and info["processes"] == 1


def test_tensorboard_has_every_step(unbroken):
    "Catches events that are never flushed, or counted from another step than metrics.csv."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(unbroken/"tensorboard")).Reload()
    points = [(event.step, event.value) for event in board.Scalars("loss")]
    assert points == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in read_metrics(unbroken)]
    assert [event.step for event in board.Images("samples")] == [2, 4, 6]


def test_checkpoints_hold_no_code_and_the_last_two_stay(unbroken):
    "Catches pickled objects, which run code when they are read, and a disk that fills up."
    folders = sorted((unbroken/"checkpoints").iterdir())
    assert [f.name for f in folders] == ["step_0000004", "step_0000006"]
    for folder in folders:
        assert sorted(p.name for p in folder.iterdir()) == [*(f"{name}.safetensors" for name in FILES), "seal.json"]
        assert read_seal(folder)["step"] == int(folder.name[5:])
        assert load_file(folder/"model.safetensors").keys() == UNet(**NET).state_dict().keys()


def test_load_run_returns_the_average(unbroken):
    "Catches raw weights handed to the sampler, and weights by the wrong schedule or objective."
    model, schedule, config = load_run(unbroken)
    files = {name: load_file(latest_checkpoint(unbroken)/f"{name}.safetensors") for name in ("model", "ema")}
    weights = model.state_dict()
    assert all(torch.equal(weights[k], files["ema"][k]) for k in weights)
    assert not all(torch.equal(weights[k], files["model"][k]) for k in weights)
    assert config == CONFIG and (schedule.name, schedule.num_timesteps) == ("cosine", 50) and not model.training


def test_same_seed_same_run(unbroken, tmp_path):
    "Catches a run that depends on the global random state, or on what on_epoch draws."
    torch.manual_seed(99)
    run(tmp_path/"again")
    assert_same(parts(unbroken), parts(tmp_path/"again"))


def test_stop_in_on_epoch_then_resume_is_bit_identical(unbroken, tmp_path):
    "Catches any state that a checkpoint forgets (AdamW, average, step, draws), and samples lost to the stop."
    def stop(model, schedule, epoch):
        if epoch == 2: raise KeyboardInterrupt
        return grey(model, schedule, epoch)
    with pytest.raises(KeyboardInterrupt): run(tmp_path, on_epoch=stop)
    assert latest_checkpoint(tmp_path).name == "step_0000004" and not (tmp_path/"samples/epoch_002.png").exists()
    resumed = run(tmp_path, on_epoch=grey, resume=True)
    assert_same(parts(unbroken), parts(tmp_path))
    assert [r["loss"] for r in read_metrics(tmp_path)] == [r["loss"] for r in read_metrics(unbroken)]
    assert sorted(p.name for p in (tmp_path/"samples").iterdir()) == [f"epoch_00{i}.png" for i in (1, 2, 3)]
    saved = parts(tmp_path)
    assert all(torch.equal(v, saved[f"ema.{k}"]) for k, v in resumed.state_dict().items())


@pytest.mark.parametrize("where", ["draw_patches", "train_step"])
def test_stop_in_the_middle_of_a_step(unbroken, tmp_path, monkeypatch, capsys, where):
    "Catches half a step in a checkpoint: weights moved but not the average, or a step that is done twice."
    original, calls = getattr(training, where), []
    def press_stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3: signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, where, press_stop)
        run(tmp_path)
    assert latest_checkpoint(tmp_path).name == "step_0000003" and "step_0000003" in capsys.readouterr().out
    run(tmp_path, resume=True)
    assert_same(parts(unbroken), parts(tmp_path))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_resume_after_a_crash_cuts_the_log(unbroken, tmp_path):
    "Catches steps that stand twice in metrics.csv: here the process died at step 6, its last checkpoint is step 4."
    shutil.copytree(unbroken, tmp_path/"crashed")
    shutil.rmtree(tmp_path/"crashed/checkpoints/step_0000006")
    (tmp_path/"crashed/checkpoints/unfinished").mkdir()
    run(tmp_path/"crashed", resume=True)
    assert_same(parts(unbroken), parts(tmp_path/"crashed"))
    assert [r["step"] for r in read_metrics(tmp_path/"crashed")] == [1, 2, 3, 4, 5, 6]


def test_finished_run_resumed_stays_as_it_is(unbroken, tmp_path):
    "Catches a finished run that trains on, or draws its samples again."
    shutil.copytree(unbroken, tmp_path/"done")
    run(tmp_path/"done", on_epoch=lambda *_: pytest.fail("drawn again"), resume=True)
    assert_same(parts(unbroken), parts(tmp_path/"done"))
    assert (tmp_path/"done/metrics.csv").read_bytes() == (unbroken/"metrics.csv").read_bytes()


def test_nothing_is_overwritten(unbroken):
    "Catches a night of training lost to a second start in the same folder."
    with pytest.raises(FileExistsError, match="step_0000006.*resume=True"): run(unbroken)
    with pytest.raises(ValueError, match="lr was 0.001, is 0.002") as error:
        run(unbroken, replace(CONFIG, lr=2e-3, batch_size=2), resume=True)
    assert "batch_size was 4, is 2" in str(error.value) and "seed" not in str(error.value)


def test_auto_precision_stays_for_a_resumed_run(tmp_path, monkeypatch):
    "Catches a run that changes its precision half-way because the machine was busy when it was resumed."
    config = replace(CONFIG, precision="auto", epochs=1)
    monkeypatch.setattr(training, "pick_precision", lambda device, precision: "float32")
    run(tmp_path, config)
    monkeypatch.setattr(training, "pick_precision", lambda device, precision: "bfloat16")
    run(tmp_path, config, resume=True)
    assert json.loads((tmp_path/"config.json").read_text(encoding="utf-8"))["precision_used"] == "float32"


NAN_STEPS, WHOLE = (3, 4), 6

def nan_at(monkeypatch, steps):
    "Plant a loss that is no number at some steps (0-based)."
    original, calls = training.diffusion_loss, []
    def loss(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)*(math.nan if len(calls)-1 in steps else 1)
    monkeypatch.setattr(training, "diffusion_loss", loss)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_bad_steps_are_skipped_and_counted(tmp_path, monkeypatch, precision):
    "Catches NaN weights, moments or averages; AdamW's step counter going on; a count that is lost at the checkpoint."
    nan_at(monkeypatch, NAN_STEPS)
    run(tmp_path, replace(CONFIG, precision=precision, epochs=4))
    rows, numbers = read_metrics(tmp_path), parts(tmp_path)
    assert [row["step"] for row in rows if not math.isfinite(row["loss"])] == [n+1 for n in NAN_STEPS]
    assert all(v.isfinite().all() for v in numbers.values())
    assert {v.item() for k, v in numbers.items() if k.endswith(".step")} == {8-len(NAN_STEPS)}
    assert read_seal(latest_checkpoint(tmp_path))["skipped"] == len(NAN_STEPS)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_bad_step_leaves_the_weights(optimizer):
    "Catches an optimizer that looks for `found_inf` in vain (only fused ones do): its weights would turn NaN."
    model, x0 = UNet(**NET), torch.full((4, 3, 8, 8), math.inf)
    before = [p.clone() for p in model.parameters()]
    train_step(model, optimizer(model.parameters(), lr=.1), x0, get_schedule("cosine", 50))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    "Catches a run that burns its night on NaN, a message without a way out, a good checkpoint replaced by a bad one."
    nan_at(monkeypatch, range(3, 100))
    with pytest.raises(FloatingPointError) as error: run(tmp_path, replace(CONFIG, epochs=20))
    for text in ("loss nan", "at step 8", "5 bad ones in a row", "pixels from 0 to 255", "learning rate", "float32"):
        assert text in str(error.value)
    assert parts(tmp_path)["step"] in (4, 6) and all(v.isfinite().all() for v in parts(tmp_path).values())


def test_bad_steps_now_and_then_do_not(tmp_path, monkeypatch):
    "Catches a count that is never set back: eight bad steps, never five in a row."
    nan_at(monkeypatch, (0, 1, 2, 3, 5, 6, 7, 8))
    run(tmp_path, replace(CONFIG, epochs=5))
    assert read_seal(latest_checkpoint(tmp_path))["skipped"] == 8


def test_float16_finds_its_factor(tmp_path):
    "A factor that is far too large must be halved until the gradients fit, and survive a stop. Catches a missing scaler."
    config = replace(CONFIG, precision="float16", epochs=15)
    def stop(model, schedule, epoch):
        if epoch == 8: raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patched:
        original = torch.amp.GradScaler
        patched.setattr(torch.amp, "GradScaler", lambda device, enabled: original(device, init_scale=2.**40, enabled=enabled))
        run(tmp_path/"whole", config)
        with pytest.raises(KeyboardInterrupt): run(tmp_path/"broken", config, on_epoch=stop)
        run(tmp_path/"broken", config, resume=True)
    note = read_seal(latest_checkpoint(tmp_path/"whole"))
    assert 3 < note["skipped"] < 25 and note["scaler"]["scale"] == 2.**(40-note["skipped"])
    assert_same(parts(tmp_path/"whole"), parts(tmp_path/"broken"))


def test_pieces_are_one_batch():
    "Gradient accumulation. Catches a sum for the mean, draws that depend on the pieces, a step for each piece."
    whole, cut, x0, schedule = Plain(), Plain(), torch.rand(8, 3, 8, 8), get_schedule("cosine", 50)
    cut.load_state_dict(whole.state_dict())
    for model, pieces in ((whole, 1), (cut, 4)):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for seed in (1, 2):
            result = train_step(model, optimizer, x0, schedule, pieces=pieces, generator=torch.Generator().manual_seed(seed))
        if pieces == 1: expected = result
    torch.testing.assert_close(result, expected)
    for p, q in zip(whole.parameters(), cut.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*(f"{name}.safetensors" for name in FILES), "seal.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "text"])
def test_damaged_checkpoint_is_named(unbroken, tmp_path, name, damage):
    "Catches an error from deep inside a reader that does not say which file, and a state that is half replaced."
    folder = shutil.copytree(latest_checkpoint(unbroken), tmp_path/"step_0000006")
    if damage == "cut": (folder/name).write_bytes((folder/name).read_bytes()[:200])
    if damage == "gone": (folder/name).unlink()
    if damage == "text": (folder/name).write_text("not a checkpoint", encoding="utf-8")
    state = new_state(CONFIG)
    before = [p.clone() for p in state.model.parameters()]
    with pytest.raises(ValueError, match=rf"{name}.*damaged or missing") as error: load_checkpoint(folder, state)
    assert "step_0000006" in str(error.value)
    assert state.step == 0 and all(torch.equal(p, q) for p, q in zip(before, state.model.parameters()))


def test_load_run_without_a_run(tmp_path):
    "Catches an unclear error for a mistyped folder, or for a run that has not saved yet."
    with pytest.raises(FileNotFoundError, match="no config.json"): load_run(tmp_path/"nowhere")
    run(tmp_path/"run", replace(CONFIG, epochs=1))
    shutil.rmtree(tmp_path/"run/checkpoints")
    with pytest.raises(FileNotFoundError, match="no checkpoints"): load_run(tmp_path/"run")


def test_metrics_can_be_read_while_training(tmp_path):
    "Catches lines that wait in a buffer, or stand half written in the file, when somebody plots a run that goes on."
    seen = []
    run(tmp_path, on_epoch=lambda model, schedule, epoch: seen.append(len(read_metrics(tmp_path))))
    assert seen == [2, 4, 6]


def test_watching(tmp_path):
    "Catches a live curve that never comes, or shows other losses than the log."
    seen = []
    run(tmp_path, watch=lambda losses: seen.append([*losses]))
    assert len(seen) >= CONFIG.epochs and seen[-1] == [row["loss"] for row in read_metrics(tmp_path)]


def test_old_pictures_are_drawn_again(unbroken, tmp_path):
    "Catches samples of an earlier run passed off as this one's, after its checkpoints were deleted."
    shutil.copytree(unbroken/"samples", tmp_path/"samples")
    (tmp_path/"samples/epoch_001.png").write_bytes(b"old")
    run(tmp_path, on_epoch=grey)
    assert (tmp_path/"samples/epoch_001.png").read_bytes() == (unbroken/"samples/epoch_001.png").read_bytes()


def test_fit_in_a_thread(unbroken, tmp_path):
    "Catches signal handling outside the main thread, where Python forbids it (a server, a progress window)."
    thread = threading.Thread(target=run, args=(tmp_path/"run",))
    thread.start()
    thread.join()
    assert_same(parts(unbroken), parts(tmp_path/"run"))


def test_epoch_is_once_through_the_patches(tmp_path):
    "Catches steps_per_epoch = 0 taken literally: an endless loop or no training at all."
    run(tmp_path, replace(CONFIG, steps_per_epoch=0, epochs=2, batch_size=3))
    assert len(read_metrics(tmp_path)) == 2*(6//3)


def test_seconds_per_step_trains_nothing_else():
    "Catches a speed trial that returns no time, or changes the caller's randomness."
    before = torch.get_rng_state()
    assert 0 < seconds_per_step(CONFIG, PIXELS, "cpu", "float32", steps=2) < 10
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_is_the_same_step():
    "Catches a CUDA graph that was recorded with other weights, another memory order, or gradients that add up."
    config, schedule = replace(CONFIG, precision="float32"), get_schedule(CONFIG.schedule, CONFIG.T).to("cuda")
    states = [new_state(config, "cuda") for _ in range(2)]
    record_graph(states[1].model, config, "float32")
    pixels = PIXELS.cuda()
    for _ in range(5): plain, recorded = ([value.item() for value in advance(state, config, pixels, schedule, 10, "float32")] for state in states)
    assert recorded == pytest.approx(plain, rel=1e-3)


def test_on_a_cpu_nothing_is_recorded():
    "Catches a network whose forward was replaced where there is no GPU to replay on."
    model = new_state(CONFIG).model
    assert record_graph(model, CONFIG, "float32") is model and "forward" not in vars(model)
