"""Pictures: what is drawn is the data, on the axes that were given, without a display."""

import subprocess
import sys

import matplotlib as mpl
import numpy
import pytest
import torch
from helpers import mlp, values
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import same_color

import biofunc as bf
from biofunc import compare, measure, plot, report


@pytest.fixture(autouse=True)
def headless():
    mpl.use("Agg")
    yield
    pyplot.close("all")


def arms(times=13, members=6):
    names = ("plain", "fuzzy_learning_rates", "crystallize")
    return {name: values(seed, (members, times)) for seed, name in enumerate(names)}


def drawn(ax):
    """Lines by label."""
    return {line.get_label(): line for line in ax.get_lines()}


def test_learning_curves_draw_the_mean_and_its_band():
    curves, steps = arms(), range(0, 130, 10)
    ax = plot.learning_curves(curves, steps, baseline="plain")
    lines = drawn(ax)
    assert list(lines) == ["plain", "fuzzy learning rates", "crystallize"]
    for (name, curve), band in zip(curves.items(), ax.collections, strict=True):
        line = lines[name.replace("_", " ")]
        numpy.testing.assert_allclose(line.get_xdata(), steps)
        numpy.testing.assert_allclose(line.get_ydata(), curve.double().mean(0))
        half = 1.96 * curve.double().std(0) / 6**0.5
        edges = band.get_paths()[0].vertices[:, 1]
        assert edges.max() == pytest.approx((curve.double().mean(0) + half).max().item())
        assert edges.min() == pytest.approx((curve.double().mean(0) - half).min().item())
    assert ax.get_xlabel() == "step"
    assert lines["plain"].get_linestyle() == ":"
    assert same_color(lines["plain"].get_color(), plot.COLOURS[0])


def test_arms_differ_in_colour_and_in_marker_and_keep_theirs_without_the_baseline():
    curves = {f"arm {i}": torch.rand(2, 4, generator=torch.Generator().manual_seed(i)) for i in range(14)}
    with_baseline = drawn(plot.learning_curves({"plain": curves["arm 0"], **curves}, baseline="plain"))
    without = drawn(plot.learning_curves(curves))
    looks = {name: (line.get_color(), line.get_marker()) for name, line in without.items()}
    assert len(set(looks.values())) == 14
    assert len({marker for _, marker in list(looks.values())[:6]}) == 6
    assert plot.COLOURS[0] not in [colour for colour, _ in looks.values()]
    assert all((with_baseline[name].get_color(), with_baseline[name].get_marker()) == looks[name] for name in looks)


def test_a_single_run_has_no_band_and_curves_may_be_arrays():
    ax = plot.learning_curves({"run": numpy.array([1.0, 2.0, 4.0]), "other": torch.tensor([[1.0, 1.0, 1.0]])})
    assert not ax.collections
    numpy.testing.assert_allclose(drawn(ax)["run"].get_ydata(), [1, 2, 4])
    numpy.testing.assert_allclose(drawn(ax)["run"].get_xdata(), [0, 1, 2])


def test_a_leaf_that_requires_grad_or_is_half_precision_is_drawn():
    curve = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    numpy.testing.assert_allclose(drawn(plot.learning_curves({"a": curve}))["a"].get_ydata(), 1)


@pytest.mark.parametrize("reach", [0.5, 30.0, 3e5])
def test_symlog_ticks_are_plain_numbers_within_the_picture(reach):
    ax = plot.learning_curves({"a": torch.tensor([-reach, 0.0, reach])}, symlog=1)
    assert ax.get_yscale() == "symlog"
    ticks = ax.get_yticks().tolist()
    assert 0 in ticks
    assert 3 <= len(ticks) <= 19
    assert all(-1.2 * reach <= tick <= 1.2 * reach for tick in ticks)
    assert (1 in ticks) == (reach > 1)
    ax.figure.canvas.draw()
    assert "0.5" in [label.get_text() for label in ax.get_yticklabels()]


def test_survival_is_in_per_cent_with_a_band_over_members():
    curves = torch.tensor([[1.0, 0.8, 0.5], [1.0, 0.6, 0.3]])
    ax = plot.survival_curve(curves, [0, 4, 8])
    (line,) = ax.get_lines()
    numpy.testing.assert_allclose(line.get_xdata(), [0, 4, 8])
    numpy.testing.assert_allclose(line.get_ydata(), [100, 70, 40], rtol=1e-6)
    assert len(ax.collections) == 1
    assert ax.get_legend() is None
    assert ax.get_ylim()[0] == 0
    both = plot.survival_curve({"small": curves, "random": curves[0]})
    assert [text.get_text() for text in both.get_legend().get_texts()] == ["small", "random"]


def test_survival_takes_logarithmic_axes_as_they_are():
    given = pyplot.subplots()[1]
    given.set(yscale="log", ylim=(1, 100))
    ax = plot.survival_curve(torch.tensor([1.0, 0.5, 0.25]), ax=given)
    assert ax.get_yscale() == "log"
    assert ax.get_ylim() == (1, 100)


def test_spectrum_bars_are_the_shares():
    params, grads = mlp()
    learn = bf.chain(bf.crystallize, bf.fuzzy_learning_rates, bf.descend(0.1))
    state = learn.init(params, bf.random.key(0))
    for _ in range(5):
        params, _, state = learn(params, grads, state, crystal_thresh=0.5)
    ax = plot.rate_spectrum(state)
    heights = [bar.get_height() for bar in ax.patches]
    numpy.testing.assert_allclose(heights, 100 * measure.rate_spectrum(state))
    assert sum(heights) == pytest.approx(100, rel=1e-5)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    ax = plot.rate_spectrum(torch.tensor([0.1, 1.0, 1.0, 9.0]), edges=[0.5, 0.9, 2.0], colour="#123456")
    assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in ax.patches] == [
        (0.5, pytest.approx(0.4), 25),
        (0.9, pytest.approx(1.1), 75),
    ]
    assert same_color(ax.patches[0].get_facecolor(), "#123456")
    assert ax.get_ylim()[0] < 25


def test_the_spectrum_of_an_ensemble_is_that_of_all_its_synapses():
    params = bf.ensemble.stack([mlp(seed)[0] for seed in range(3)])
    states = torch.vmap(lambda p, k: bf.init(p, k, bf.fuzzy_learning_rates))(params, bf.random.key(torch.arange(3)))
    ax = plot.rate_spectrum(states, where="fc1*")
    rates = states.plasticity["fc1.weight"].flatten()
    # float32 shares, of one member each and then averaged
    heights = [bar.get_height() for bar in ax.patches]
    numpy.testing.assert_allclose(heights, 100 * measure.rate_spectrum(rates), rtol=1e-6)


def test_curves_of_one_arm_need_no_name():
    curve = values(0, (6, 13))
    one, named = plot.learning_curves(curve), plot.learning_curves({"": curve})
    numpy.testing.assert_array_equal(one.lines[0].get_ydata(), named.lines[0].get_ydata())
    assert len(one.collections) == 1
    assert one.get_legend() is None
    numpy.testing.assert_array_equal(plot.learning_curves(curve.numpy()).lines[0].get_ydata(), one.lines[0].get_ydata())


def test_panels_that_share_an_axis_cut_no_bar():
    panels = pyplot.subplots(1, 3, sharey=True)[1]
    for ax, share in zip(panels, (2, 10_000, 2), strict=True):
        plot.rate_spectrum(torch.cat([torch.ones(share), torch.tensor([0.1])]), ax=ax)
    assert panels[0].get_ylim()[0] < 100 / 10_001
    assert panels[0].get_ylim()[1] > 100


def test_sizes_have_unit_area_and_their_own_log_normal():
    z = bf.random.normal(bf.random.key(0), (200, 100), dtype=torch.float64)
    w = (0.7 * z - 2).exp() * torch.where(values(1, z.shape) > 0, 1, -1)
    w[0, 0] = 0
    ax = plot.size_distribution({"w": w, "bias": torch.ones(100)})
    area = sum(
        bar.get_height() * (numpy.log(bar.get_x() + bar.get_width()) - numpy.log(bar.get_x())) for bar in ax.patches
    )
    assert area == pytest.approx(1)
    assert len(ax.patches) == 60
    ax.figure.canvas.draw()
    highest = ax.transData.transform((1, max(bar.get_height() for bar in ax.patches)))[1]
    assert ax.get_legend().get_window_extent().y0 > highest
    (fit,) = ax.get_lines()
    x, density = fit.get_xdata(), fit.get_ydata()
    logs = w[w != 0].abs().log()
    assert numpy.log(x[density.argmax()]) == pytest.approx(logs.mean().item(), abs=0.05)
    assert density.max() == pytest.approx(1 / (logs.std().item() * (2 * numpy.pi) ** 0.5), rel=1e-3)
    heights = numpy.array([bar.get_height() for bar in ax.patches])
    centres = numpy.array([(bar.get_x() * (bar.get_x() + bar.get_width())) ** 0.5 for bar in ax.patches])
    assert abs(heights - numpy.interp(centres, x, density)).max() < 0.05
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "19," in " ".join(labels)
    assert f"{logs.mean():.2f} ± {logs.std():.2f}" in " ".join(labels)


def test_sizes_that_are_all_equal_have_bars_and_no_fit():
    ax = plot.size_distribution(torch.full((4, 4), -0.5))
    assert not ax.get_lines()
    assert sum(bar.get_height() > 0 for bar in ax.patches) == 1


INTERVALS = {
    "up": (1.0, 0.5, 1.5),
    "down_there": (-1.0, -1.5, -0.5),
    "open": (0.1, -0.2, 0.3),
    "one_seed": (2.0, float("nan"), float("nan")),
}


@pytest.mark.parametrize(("higher", "good", "bad"), [(True, "up", "down_there"), (False, "down_there", "up")])
def test_forest_shows_the_verdict_in_colour_and_marker(higher, good, bad):
    ax = plot.forest(INTERVALS, higher_is_better=higher)
    points = {}
    for container in ax.containers:
        line, _, (bars,) = container
        for x, y, segment in zip(line.get_xdata(), line.get_ydata(), bars.get_segments(), strict=True):
            points[list(INTERVALS)[y]] = (x, segment[:, 0].tolist(), container.get_label(), line)
    for name, (difference, low, high) in INTERVALS.items():
        assert points[name][0] == difference
        assert points[name][1] == pytest.approx([low, high] if low == low else [difference, difference])
    assert {name: point[2] for name, point in points.items()} == {
        good: "better",
        bad: "worse",
        "open": "undecided",
        "one_seed": "undecided",
    }
    assert len({points[name][3].get_marker() for name in (good, bad, "open")}) == 3
    assert len({points[name][3].get_color() for name in (good, bad, "open")}) == 3
    assert ax.get_ylim() == (3.5, -0.5)  # the first arm on top
    assert [label.get_text() for label in ax.get_yticklabels()] == ["up", "down there", "open", "one seed"]
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["+1.00 [+0.50, +1.50]", "−1.00 [−1.50, −0.50]", "+0.10 [−0.20, +0.30]", "+2.00"]


def test_a_forest_of_small_differences_shows_three_digits_of_the_widest():
    texts = [text.get_text() for text in plot.forest({"a": (0.0012, 0.0004, 0.0021), "b": (0.0, -0.01, 0.01)}).texts]
    assert texts == ["+0.0012 [+0.0004, +0.0021]", "+0.0000 [−0.0100, +0.0100]"]


def test_forest_on_a_symlog_axis():
    ax = plot.forest({**INTERVALS, "far": (-50.0, -60.0, -40.0)}, symlog=1)
    assert ax.get_xscale() == "symlog"
    assert {-10, -1, 0, 1} <= set(ax.get_xticks().tolist())


PICTURES = [
    lambda **kw: plot.learning_curves(arms(), **kw),
    lambda **kw: plot.survival_curve(torch.tensor([1.0, 0.5]), **kw),
    lambda **kw: plot.rate_spectrum(torch.tensor([0.5, 1.0]), **kw),
    lambda **kw: plot.size_distribution(values(0, (9, 9)), **kw),
    lambda **kw: plot.forest(INTERVALS, **kw),
]


@pytest.mark.parametrize("picture", PICTURES)
def test_axes_are_made_or_taken_and_returned(picture, tmp_path):
    made = picture()
    assert isinstance(made, Axes)
    assert made.figure.number in pyplot.get_fignums()
    given = pyplot.subplots(1, 2)[1][1]
    before = pyplot.get_fignums()
    assert picture(ax=given) is given
    assert pyplot.get_fignums() == before
    assert given.has_data()
    made.figure.savefig(tmp_path / "picture.png")
    assert mpl.image.imread(tmp_path / "picture.png").std() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.learning_curves({}), "curves is empty"),
        (lambda: plot.learning_curves(arms(), baseline="none"), "baseline is 'none'; the curves are plain, fuzzy"),
        (lambda: plot.learning_curves(arms(), range(5)), "curves.'plain'. has shape .6, 13.; give .members, time."),
        (lambda: plot.learning_curves({"a": torch.ones(2, 3, 4)}), "curves.'a'. has shape .2, 3, 4."),
        (lambda: plot.learning_curves({"a": torch.ones(2), "b": torch.ones(3)}), "curves.'b'. has shape .1, 3."),
        (lambda: plot.learning_curves({"a": torch.ones(0, 3)}), "curves.'a'. has shape .0, 3."),
        (lambda: plot.learning_curves(arms(), symlog=0), "symlog is 0; it must be positive"),
        (lambda: plot.rate_spectrum(torch.ones(3), edges=[0.0, 1.0]), "edges start at 0.0"),
        (lambda: plot.rate_spectrum(torch.ones(3), edges=[1.0, 0.5]), "two or more that rise"),
        (lambda: plot.rate_spectrum(torch.ones(0)), "rates hold no synapse"),
        (lambda: plot.size_distribution(torch.zeros(2, 2)), "no weight other than 0"),
        (lambda: plot.forest({}), "intervals is empty"),
        (lambda: plot.forest({"a": (0.0, 1.0, 2.0)}), "intervals.'a'. is .0.0, 1.0, 2.0.; give"),
        (lambda: plot.forest(INTERVALS, symlog=-1), "symlog is -1"),
        (lambda: plot.forest({"a": (0.0, 1.0)}), "intervals.'a'. is"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert not pyplot.get_fignums()  # nothing half drawn stays open


def fake_comparison(names):
    config = compare.Config(arms=tuple(names))
    results = {
        name: compare.ArmResult(
            values(seed, (4, 5)).abs(), values(seed, (5, 30)).abs() if seed else torch.ones(5, 30), 1
        )
        for seed, name in enumerate(names)
    }
    return compare.Comparison(config, [0, 10, 20, 30], results, "eager")


def test_the_report_draws_its_arms_with_these_functions():
    comparison = fake_comparison(("plain", "crystallize", "all_five"))
    left, right = report.curves_figure(comparison).axes
    plain, crystallize = [comparison.arms[name].accuracy.double() for name in ("plain", "crystallize")]
    numpy.testing.assert_allclose(drawn(left)["crystallize"].get_ydata(), 100 * crystallize.mean(1))
    numpy.testing.assert_allclose(drawn(right)["crystallize"].get_ydata(), 100 * (crystallize - plain).mean(1))
    assert drawn(left)["all five"].get_color() == drawn(right)["all five"].get_color()
    assert right.get_yscale() == "symlog"
    panels = report.rates_figure(comparison).axes
    assert [ax.get_title() for ax in panels] == ["crystallize", "all five"]
    assert same_color(panels[1].patches[0].get_facecolor(), drawn(left)["all five"].get_color())
    for figure in (report.curves_figure, report.rates_figure):
        figure(fake_comparison(("plain",))).canvas.draw()


def run(code):
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_matplotlib_is_loaded_when_plot_is_used_and_not_before():
    code = """if True:
        import sys, biofunc as bf
        assert "matplotlib" not in sys.modules and "biofunc.plot" not in sys.modules
        bf.plot.forest
        assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
        from biofunc import plot
        assert plot is bf.plot
        try:
            bf.plots
        except AttributeError as error:
            print(error)"""
    done = run(code)
    assert done.stdout == "module 'biofunc' has no attribute 'plots'\n", done.stderr


def test_without_matplotlib_one_error_says_what_to_install():
    code = """if True:
        import sys
        sys.modules["matplotlib"] = None
        import biofunc as bf
        for use in ("import biofunc.plot", "bf.plot", "from biofunc import plot"):
            try:
                exec(use)
            except ModuleNotFoundError as error:
                assert error.__suppress_context__ and error.name == "matplotlib"
                print(error)"""
    done = run(code)
    line = "biofunc.plot needs matplotlib, which is not installed: pip install '.[plot]' in the checkout\n"
    assert done.stdout == 3 * line, done.stderr
