"""The benchmark's harness, its statistics and its reports."""

HARNESS, COMPARE, STATISTICS, RUN = "bench/harness", "bench/compare", "bench/statistics", "bench/run"
RESULTS, CHECK = "bench/results", "bench/check"
NAMED = "bench_reports::compare_names_what_is_missing_broken_new_or_throttled"

# fmt: off
MUTANTS = {
    "passed: a line that failed is no regression": (COMPARE, 'return len(self.broken) + verdicts.count("slower")', 'return verdicts.count("slower")',
        "bench_reports::a_line_that_failed_is_a_regression"),
    "passed: a line that failed is only missing": (COMPARE, "broken={key: failure for key, failure in failed.items() if _ours(key)}", "broken={}", NAMED),
    "passed: a peer that failed is broken": (COMPARE, "in failed.items() if _ours(key)}", "in failed.items()}",
        "bench_reports::a_peers_line_that_failed_is_missing"),
    "passed: failed lines alone are nothing to compare": (COMPARE, "if not comparison.drifts and not comparison.broken:", "if not comparison.drifts:",
        "bench_reports::a_line_that_failed_is_a_regression"),
    "order: before and after exchanged": (COMPARE, 'statistics.changed(a[key]["samples_s"], b[key]["samples_s"])', 'statistics.changed(b[key]["samples_s"], a[key]["samples_s"])',
        "bench_reports::compare_catches_ten_percent_and_stays_quiet_on_reruns"),
    "lost: the earlier of two measurements counts": (COMPARE, "({results.key(record): record for record in records} for", "({results.key(record): record for record in reversed(list(records))} for",
        "bench_reports::of_two_measurements_the_later_counts"),
    "order: every round begins with the same": (HARNESS, "running[(k + done) % len(running)]", "running[k % len(running)]",
        "bench_harness::rounds_begin_with_another_each_time"),
    "retry: a disturbed sample is kept at once": (HARNESS, "        if not disturbed or ended > deadline:\n", "        if True:\n",
        "bench_harness::a_disturbed_sample_is_tried_again"),
    "retry: undisturbed samples are tried again": (HARNESS, "        if not disturbed or ended > deadline:\n", "        if ended > deadline:\n",
        "bench_harness::a_disturbed_sample_is_tried_again"),
    "order: what is wrong is timed": (HARNESS, "        entrant.failure = f", "        entrant.error = entrant.failure = None or f", "bench_run::what_fails_is_a_line_and_the_others_go_on"),
    "scale: a sample is all of its steps": (HARNESS, "entrant.samples.append(seconds / entrant.steps)", "entrant.samples.append(seconds)",
        "bench_harness::a_disturbed_sample_is_tried_again"),
    "ignored: a noisy line": (HARNESS, "if entrant.disturbed * 2 > len(entrant.samples) or", "if", "bench_harness::lines_of_disturbed_samples_are_noisy"),
    "flag: a time below its floor": (HARNESS, "if median < least * case.T:", "if median < 0:", "bench_run::a_time_below_the_floor_is_flagged"),
    "order: a ratio upside down": (STATISTICS, "quotients = b / a", "quotients = a / b", "bench_run::ratio_is_of_pairs"),
    "limit: a slowdown whose interval holds 1": (STATISTICS, "if low > 1 and middle >= 1 + least:", "if middle >= 1 + least:", "bench_run::changed_tells_a_slowdown_from_noise"),
    "limit: few samples are enough": (STATISTICS, "if min(a.size, b.size) < FEWEST_SAMPLES:", "if False:", "bench_run::changed_tells_a_slowdown_from_noise"),
    "code: a run with a failing line ends well": (RUN, "return 1 if failures else 0", "return 0", "bench_run::run_with_a_failing_line_exits_with_1"),
    "repeat: what is measured is measured again": (RUN, "in plan.known for implementation in runners):", "in () for implementation in runners):", "bench_run::run_keeps_its_lines_and_resumes"),
    "ignored: --rounds": (RUN, "settings = replace(settings, rounds=options.rounds)", "settings = replace(settings)", "bench_run::run_keeps_its_lines_and_resumes"),
    "stale: half a line stays": (RESULTS, '            file.truncate(content.rfind(b"\\n") + 1)\n', "            pass\n", "bench_run::a_half_written_line_is_left_out_and_cut_off"),
    "passed: NaN is near enough": (CHECK, "if not error <= allowed:", "if error > allowed:", "bench_run::check_sees_what_is_wrong"),
    "sum: stolen time is not the others'": ("bench/quiet", "irq + softirq + steal", "irq + softirq", "bench_run::disturbed_counts_what_others_took"),
}
# fmt: on
