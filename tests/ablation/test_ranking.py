"""The verdict on an ablation, by worked examples."""

from __future__ import annotations

from arvideo_ds.ablation.ranking import compare, differences, sign_flip_test, verdict


def test_ranking_by_a_worked_example() -> None:
    # The paper: a above b above c; d ties with a, e has no figure, f was not measured.
    rows = [
        ("a", 66.8, [80, 82, 81]),
        ("b", 66.0, [82.5, 81.5, 80.9]),
        ("c", 64.0, [70, 71, 69]),
        ("d", 66.8, [90, 90, 90]),
        ("e", None, [10, 10, 10]),
        ("f", 60.0, []),
    ]
    pairs = {(pair.above, pair.below): pair for pair in compare(rows)}
    assert set(pairs) == {("a", "b"), ("a", "c"), ("d", "b"), ("d", "c"), ("b", "c")}
    # 81 against 81.63, deviations 1 and 0.81: standard error 0.74, so 0.63 may be chance.
    assert round(pairs["a", "b"].difference, 2) == -0.63
    assert not pairs["a", "b"].significant
    assert pairs["a", "c"].difference == 11
    assert pairs["a", "c"].significant
    assert verdict(compare(rows)) == (
        "The order does not agree with the paper's: 4 of 5 pairs of rows as in the paper "
        "(4 significant), 1 not (0 significant)."
    )


def test_a_significant_disagreement_is_named() -> None:
    said = verdict(compare([("a", 2.0, [10, 11]), ("b", 1.0, [20, 21])]))
    assert said.endswith("1 not (1 significant: b above a).")


def test_full_agreement_and_nothing_to_compare() -> None:
    rows = [("a", 2.0, [10, 11]), ("b", 1.0, [1, 2])]
    assert verdict(compare(rows)) == (
        "The order agrees with the paper's: 1 of 1 pairs of rows as in the paper (1 significant)."
    )
    assert verdict(compare([("a", None, [1, 2]), ("b", 1.0, [1, 2])])) == (
        "The paper has no order to compare with."
    )


def test_of_one_seed_nothing_is_significant() -> None:
    (pair,) = compare([("a", 2.0, [90]), ("b", 1.0, [1])])
    assert not pair.significant


def test_level_rows_do_not_agree_with_an_order() -> None:
    said = verdict(compare([("a", 2.0, [10, 10]), ("b", 1.0, [10, 10])]))
    assert "0 of 1 pairs" in said
    assert said.endswith("1 not (0 significant).")


def test_significant_is_welchs_t_test_at_five_percent() -> None:
    # 81 against 78.33 and 79.13, deviations 1 and 0.93: the standard error of the difference is
    # 0.79, with 3 degrees of freedom (3.98) p = 5 % at 2.51.
    (pair,) = compare([("a", 2.0, [80, 82, 81]), ("b", 1.0, [78.6, 79.1, 77.3])])
    assert pair.significant
    (pair,) = compare([("a", 2.0, [80, 82, 81]), ("b", 1.0, [79.4, 79.9, 78.1])])
    assert not pair.significant
    (pair,) = compare([("a", 2.0, [90, 90, 90]), ("b", 1.0, [80, 80, 80])])
    assert pair.significant
    # Paired: 38.3, 36.8 and 14.9, 4.0 standard errors of three seeds, where 4.3 are needed.
    rows = [("a", {0: 0.0, 1: 0.0, 2: 0.0}), ("b", {0: -38.3, 1: -36.8, 2: -14.9})]
    assert differences(rows).endswith("b -30.0 ± 7.6 (not significant).")


def test_the_sign_flip_test_is_exact() -> None:
    assert sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_test([5.0] * 6) == 2 / 64
    assert sign_flip_test([1.0, -1.0]) == 1
    assert sign_flip_test([0.0, 0.0]) == 1
    # The sum is 6; 4 + 3 + 1 is larger, and both have a mirror image.
    assert sign_flip_test([4.0, 3.0, -1.0]) == 4 / 8
    folds = {(fold, seed): 10.0 * fold + seed for fold in range(3) for seed in range(3)}
    better = {number: value + 1 + number[1] for number, value in folds.items()}
    text = differences([("a", folds), ("b", better)])
    assert text.endswith("b +2.0 ± 0.3 (significant, p = 0.0039).")


def test_differences_are_of_the_same_seeds() -> None:
    """Seeds that are hard for all rows do not count as spread."""
    pretrained, scratch = {0: 35.0, 1: 40.0, 2: 60.0}, {0: 20.0, 1: 26.0, 2: 44.0}
    rows = [("pretrained", pretrained), ("scratch", scratch), ("half", {2: 50.0}), ("none", {})]
    # 15, 14 and 16: deviation 1, so a standard error of 0.58.
    assert differences(rows) == (
        "Against pretrained, seed by seed, mean ± standard error: "
        "scratch -15.0 ± 0.6 (significant), half -10.0."
    )
    assert "(not significant)" in differences([("a", {0: 1.0, 1: 2.0}), ("b", {0: 2.0, 1: 2.0})])
    assert differences([("a", {}), ("b", {0: 1.0})]) == "Nothing to compare yet."
