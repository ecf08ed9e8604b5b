"""The benchmarks' readers: comparison, tables, figures, profile; on made-up results, whose truth is known."""

import argparse
import json
import math

import numpy as np
import pytest

from bench import compare, plots, profile, profile_cpu, report, statistics, tables
from bench.cases import GROUPS, Case
from bench.standings import sections, standings
from gpurnn.cpu import compiled, crew

CPU = GROUPS["cpu"][:8]
PEERS = {"torch-cpu-1": 1.5, "torch-cpu-2": 1.2}
ENVIRONMENT = {"cpu": "A CPU", "torch": "2.13.0", "jax": "not installed", "bench device": "cpu"}


def record(case, phase, implementation, samples, ours=None, **more):
    median, p20, p80 = statistics.summary(samples)
    made = {
        "format": 1, "run": "r", "date": "2026-11-21T03:10:00Z", "commit": "abc1234", "case": case.name,
        "group": case.group, "cell": case.cell, "T": case.T, "N": case.N, "I": case.I, "H": case.H, "dtype": case.dtype,
        "lengths": case.lengths, "heads": case.heads, "phase": phase, "part": "layer", "implementation": implementation,
        "median_s": median, "p20_s": p20, "p80_s": p80, "samples_s": list(samples),
        "us_per_step": 1e6 * median / case.T, "tokens_per_s": case.T * case.N / median, "floor_us_per_step": 1.0,
        "percent_of_floor": 50.0, "peak_bytes": 1000, "flags": [], "environment": ENVIRONMENT,
    }  # fmt: skip
    if ours is not None:
        middle, low, high = statistics.ratio(ours, samples)
        made["ratio"] = {"to": "gpurnn-compiled", "median": middle, "low": low, "high": high}
    return made | more


def measured(seed, cases=CPU, *, drift=1.0, slow=None, peers=PEERS, rounds=11):
    """A run on a machine with a heavy right tail within a run, scatter between runs, and a drift of its own."""
    rng, records = np.random.default_rng(seed), []
    for number, case in enumerate(cases):
        for phase in ("training", "inference"):
            base, samples = 1e-3 * (1 + number), {}
            for implementation, factor in {"gpurnn-compiled": 1.0, **peers}.items():
                median = base * factor * drift * math.exp(0.007 * rng.standard_normal())
                if implementation == "gpurnn-compiled":
                    median *= (slow or {}).get(number, 1.0)
                tail = 1 + 0.3 * (rng.random(rounds) < 0.1) * rng.pareto(1.5, rounds)
                samples[implementation] = median * tail * np.exp(0.015 * rng.standard_normal(rounds))
            ours = samples["gpurnn-compiled"]
            for implementation, times in samples.items():
                peer = None if implementation == "gpurnn-compiled" else ours
                records.append(record(case, phase, implementation, times.tolist(), peer))
    return records


@pytest.fixture
def quick_bootstrap(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 300)


def slower(comparison):
    return {change.key[0] for change in comparison.changes if change.verdict == "slower"}


def test_compare_catches_ten_percent_and_stays_quiet_on_reruns(quick_bootstrap):
    planted = {CPU[2].name, CPU[5].name}
    caught = false_alarms = 0
    for seed in range(12):
        before = measured(seed)
        rerun = compare.compare(before, measured(100 + seed, drift=1.07))
        false_alarms += rerun.regressions
        found = slower(compare.compare(before, measured(200 + seed, drift=0.95, slow={2: 1.1, 5: 1.1})))
        caught += len(found & planted)
        false_alarms += len(found - planted)
    assert false_alarms == 0
    assert caught >= 22, "of 24 slow cases, each with two phases"


def test_compare_knows_a_badly_placed_thread_from_a_slowdown(quick_bootstrap):
    def run(seed, *, slow_samples, factor):
        records = measured(seed)
        for line in records:
            if line["case"] == CPU[3].name and line["implementation"] == "gpurnn-compiled":
                times = [t * factor if k < slow_samples else t for k, t in enumerate(line["samples_s"])]
                line |= {"samples_s": times, "median_s": statistics.summary(times)[0]}
        return records

    before = measured(1)
    assert not slower(compare.compare(before, run(2, slow_samples=9, factor=1.25)))
    assert slower(compare.compare(before, run(2, slow_samples=11, factor=1.25))) == {CPU[3].name}


def test_compare_sees_a_slowdown_of_everything_against_the_peers(quick_bootstrap):
    everything = dict.fromkeys(range(len(CPU)), 1.06)
    comparison = compare.compare(measured(1), measured(2, drift=0.94, slow=everything))
    assert [mean.verdict for mean in comparison.means] == ["slower", "slower"]
    assert comparison.drifts["cpu"].log == pytest.approx(math.log(0.94), abs=0.01)
    assert "times as long in B as in A, by 32 peers' lines" in compare.render(comparison, 1.03)


def test_compare_without_peers_says_so(quick_bootstrap):
    comparison = compare.compare(measured(1, peers={}), measured(2, peers={}))
    assert comparison.regressions == 0
    assert "no peer is timed in both files" in compare.render(comparison, 1.03)


def test_compare_trusts_few_peers_little(quick_bootstrap):
    """Three peers' lines of one case moved by half, which is a disturbed run and no measure of the machine."""
    before, after = measured(1, CPU[:1]), measured(2, CPU[:1], drift=0.5, slow={0: 1.6})
    comparison = compare.compare(before, after)
    assert comparison.regressions == 0
    assert "4 peers' lines" in compare.render(comparison, 1.03)


def test_compare_names_what_is_missing_broken_new_or_throttled(quick_bootstrap):
    before, after = measured(1, CPU[:3]), measured(2, CPU[:3], slow={0: 1.5, 1: 1.5})
    gone = after.pop()
    for line in after:
        if line["implementation"] == "gpurnn-compiled" and line["case"] == CPU[0].name:
            line["flags"] = ["throttled"]
    broken = after[6]
    broken |= {"failure": "wrong: y is off by 1.0e+00", "median_s": None}
    new = measured(3, CPU[3:4])
    comparison = compare.compare(before, after + new)
    assert comparison.lost == [compare.results.key(gone)]
    assert comparison.broken == {compare.results.key(broken): "wrong: y is off by 1.0e+00"}
    assert len(comparison.new) == len(new)
    assert {c.verdict for c in comparison.changes if c.key[0] == CPU[0].name} == {"unjudged"}
    assert slower(comparison) == {CPU[1].name}
    text = compare.render(comparison, 1.03)
    assert "FAILED in B (1)" in text and "missing in B (1)" in text and gone["implementation"] in text


def write(path, records):
    path.write_text("".join(json.dumps(line) + "\n" for line in records))
    return str(path)


def options(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("factor, status", [(1.0, 0), (1.4, 1)])
def test_compare_exit_status(tmp_path, capsys, quick_bootstrap, factor, status):
    a = write(tmp_path / "a.jsonl", measured(1, CPU[:3]))
    b = write(tmp_path / "b.jsonl", measured(2, CPU[:3], slow={1: factor}))
    assert compare.main(options(compare, a, b)) == status
    assert ("REGRESSION" in capsys.readouterr().out) == bool(status)


def fail(records, implementation):
    return [
        r | {"failure": "it died", "median_s": None} if r["implementation"] == implementation else r for r in records
    ]


@pytest.mark.parametrize("also", [(), tuple(PEERS)])
def test_a_line_that_failed_is_a_regression(tmp_path, capsys, quick_bootstrap, also):
    """Ours, though nobody is slower, and where nothing else can be compared."""
    after = fail(measured(1, CPU[:2]), "gpurnn-compiled")
    for peer in also:
        after = fail(after, peer)
    a, b = write(tmp_path / "a.jsonl", measured(1, CPU[:2])), write(tmp_path / "b.jsonl", after)
    assert compare.main(options(compare, a, b)) == 1
    assert "FAILED in B (4)" in capsys.readouterr().out


def test_a_peers_line_that_failed_is_missing(quick_bootstrap):
    comparison = compare.compare(measured(1, CPU[:2]), fail(measured(1, CPU[:2]), "torch-cpu-1"))
    assert comparison.broken == {} and {key[3] for key in comparison.lost} == {"torch-cpu-1"}
    assert comparison.regressions == 0


def test_of_two_measurements_the_later_counts(quick_bootstrap):
    twice = measured(2, CPU[:2], slow={0: 1.5}) + measured(3, CPU[:2])
    assert not slower(compare.compare(measured(1, CPU[:2]), twice))
    assert slower(compare.compare(measured(1, CPU[:2]), twice[::-1])) == {CPU[0].name}


def test_compare_of_files_with_nothing_in_common(tmp_path, capsys):
    a, b = (write(tmp_path / f"{n}.jsonl", measured(n, CPU[n : n + 1])) for n in range(2))
    assert compare.main(options(compare, a, b)) == 2
    assert "no timed line in common" in capsys.readouterr().out


@pytest.mark.parametrize(
    "ratio, text", [(0.9999, "0.99"), (0.996, "0.99"), (1.0, "1.00"), (1.009, "1.00"), (1.15, "1.15"), (29.97, "29.9")]
)
def test_ratios_are_rounded_down(ratio, text):
    assert tables.shown(ratio) == text


def test_standing_is_against_the_fastest_torch_and_losses_are_in_words():
    times = {"gpurnn-compiled": 1.0, "torch-cpu-1": 0.9, "torch-cpu-2": 1.3, "numpy-loop": 0.5}
    records = [record(CPU[0], "training", name, [time] * 5, [1.0] * 5) for name, time in times.items()]
    (standing,) = standings(records)
    assert standing.torch["implementation"] == "torch-cpu-1"
    assert standing.ratio == pytest.approx((0.9, 0.9, 0.9))
    (section,) = sections(records)["cpu"]
    text = tables.full(section, [])
    assert f"slower in 1: LSTM {standing.row.shape} (0.90)" in text and "Missing: jax-scan" in text


MARKED = "head\n<!-- bench:cpu begin -->\nold\n<!-- bench:cpu end -->\ntail, no newline"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(MARKED)
    (tmp_path / "bench" / "README.md").write_text(MARKED)
    write(tmp_path / "bench" / "results" / "a.jsonl", measured(1, CPU[:3]))
    return tmp_path


def test_report_writes_between_the_markers_and_check_notices(root, capsys):
    given, check = options(report, "--root", str(root)), options(report, "--root", str(root), "--check")
    assert report.main(check) == 1
    assert (root / "README.md").read_text() == MARKED, "--check writes nothing"
    assert report.main(given) == 0
    text = (root / "bench" / "README.md").read_text()
    assert text.startswith("head\n<!-- bench:cpu begin -->\n") and text.endswith("-->\ntail, no newline")
    assert "| geometric mean |" in text and "abc1234" in text and "\nold\n" not in text
    for figure in ("ratio", "time", "roofline"):
        assert (root / "bench" / "figures" / f"cpu-{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert f"figures/cpu-{figure}.png" in text
    assert report.main(check) == 0
    assert report.main(given) == 0 and (root / "bench" / "README.md").read_text() == text
    (root / "bench" / "figures" / "cpu-time.png").write_bytes(b"of other results")
    capsys.readouterr()
    assert report.main(check) == 1
    assert capsys.readouterr().out.strip() == f"out of date: {root / 'bench' / 'figures' / 'cpu-time.png'}"


@pytest.mark.parametrize(
    "text, message",
    [
        ("nothing", "no markers for cpu"),
        ("<!-- bench:cpu begin -->\n", "expected a begin and an end"),
        ("<!-- bench:cpu end -->\n<!-- bench:cpu begin -->\n", "expected a begin and an end"),
        ("<!-- bench:cqu begin -->\n<!-- bench:cqu end -->\n", "bench:cqu"),
        ("<!-- bench:cpu begin -->\n<!-- bench:cpu end -->\n" * 2, "2 times bench:cpu"),
        ("<!-- bench:train begin -->\n<!-- bench:train end -->\n", "no markers for cpu"),
    ],
)
def test_report_refuses_markers_that_make_no_sense_and_writes_nothing(root, text, message):
    (root / "bench" / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        report.main(options(report, "--root", str(root)))
    assert (root / "README.md").read_text() == MARKED and (root / "bench" / "README.md").read_text() == text


def test_peers_alone_make_tables_and_figures(tmp_path):
    case = Case("persistent", "lstm", 512, 16, 1024, 1024, "float16")
    (section,) = sections([record(case, "training", "torch-cudnn", [1.0, 1.1, 1.2])])["persistent"]
    text = tables.full(section, [])
    assert "torch-cudnn 2,148 (50%)" in text and "the peers' baselines" in text
    drawn = {path.name for path in plots.draw(section, tmp_path)}
    assert {"persistent-time.png", "persistent-roofline.png"} <= drawn and "persistent-ratio.png" not in drawn


def test_plot_draws_series_over_sizes_where_there_are_some(tmp_path, capsys):
    cases = [Case("latency", "gru", 64, N, H, H) for N in (1, 8) for H in (64, 128, 256)]
    path = write(tmp_path / "r.jsonl", measured(1, cases))
    assert plots.main(options(plots, path, "--out", str(tmp_path / "out"))) == 0
    assert (tmp_path / "out" / "latency-sizes.png").exists()
    assert "latency-ratio.png" in capsys.readouterr().out


@pytest.mark.parametrize("lengths", [None, "uniform"])
def test_profile_accounts_for_all_of_the_time_and_leaves_no_trace(lengths):
    text = profile_cpu.tables(Case("cpu", "gru", 6, 3, 4, 7, lengths=lengths), seconds=0.01)
    for table in text.split("\n\n")[1:]:
        _, *phases, whole = [line for line in table.splitlines() if "%" in line or "share" in line]
        shares = [float(line.split("%")[0].split()[-1]) for line in phases]
        assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares)) and "100.0%" in whole
        assert "time loop" in table
    assert compiled.crew is crew


def test_profile_puts_everything_back_after_an_error():
    with pytest.raises(KeyError), profile_cpu.watched({}):
        assert compiled.crew is not crew
        raise KeyError
    assert compiled.crew is crew


def test_kernel_table_shares_and_rest():
    spent = {f"kernel{k}": [10.0] * profile.STEPS for k in range(profile.MOST_KERNELS + 1)}
    text = profile.kernel_table(spent, wall=1e-3)
    assert "1 others" in text and "160.0 us" in text and "1000.0 us" in text


def test_profile_names_what_it_cannot_do():
    with pytest.raises(ValueError, match="expected a name such as"):
        profile.main(options(profile, "cpu/nothing"))
    with pytest.raises(ValueError, match="dense float32 layer"):
        profile_cpu.tables(Case("train", "lstm", 4, 2, 3, 5))
