# SPDX-License-Identifier: Apache-2.0
"""Is the filter worth using? Held-out ranking quality beside ranking by MACs, and the refusal rule."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import numpy as np

from pfnas_fast.errors import InputError
from pfnas_fast.filter.labels import collect_labels
from pfnas_fast.filter.metrics import (
    PairTau,
    cost_bins,
    label_reliability,
    pair_tau,
    regret,
    tau_within_groups,
    top_k_recall,
)

__all__ = ["choose_label", "filter_report", "held_out_scores", "plot_report"]

_LOCAL = 0.10  # "pairs within 10 % in cost"
_CURVE_SHARES = (0.35, 0.65)  # of the labels, besides all of them


def held_out_scores(
    flt: Any,
    paths: np.ndarray,
    labels: np.ndarray,
    macs_m: np.ndarray,
    *,
    bins: np.ndarray,
    num_folds: int = 5,
    label_sd: Any = None,
    share: float = 1.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Score every path by a model that has not seen it.

    Args:
        flt: Unfitted or fitted ranker with `clone`, `fit`, `score`; only its settings are used.
        paths: Distinct paths, as `PathFilter.fit` takes them.
        labels: [n].
        macs_m: [n].
        bins: int [n], folds are balanced over them.
        num_folds: At least 2.
        label_sd: As `PathFilter.fit`.
        share: Of the other folds' paths that a model is fitted on, chosen at random, at least 4; 1 = all.
        seed: Of the folds and the fits.

    Returns:
        (scores float64 [n], fold int64 [n]). Scores of different folds come from different models.
    """
    rng = np.random.default_rng([seed, 0xF01D])
    order = np.lexsort((rng.random(len(labels)), bins))
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % num_folds
    scores = np.empty(len(labels))
    sd = None if label_sd is None else np.asarray(label_sd, np.float64)
    for index in range(num_folds):
        train, test = np.flatnonzero(fold != index), fold == index
        if share < 1.0:
            chosen = np.random.default_rng([seed, index, 0x5E]).permutation(len(train))
            train = np.sort(train[chosen[: max(4, round(share * len(train)))]])
        part = sd
        if sd is not None and sd.ndim:
            part = sd[train] if sd.ndim == 1 else sd[np.ix_(train, train)]
        model = flt.clone().fit(paths[train], labels[train], macs_m[train], label_sd=part, seed=seed + index)
        scores[test] = model.score(paths[test], macs_m[test])
    return scores, fold


def choose_label(
    candidates: dict[str, np.ndarray], bins: np.ndarray
) -> tuple[str, dict[str, dict[str, float]]]:
    """Pick the label that two halves of the images agree about best inside bins.

    Args:
        candidates: Name -> [n, 2], the label of each path on either half of the images (AP, AP50, -loss,
            ...).
        bins: int [n].

    Returns:
        (name, reliability of every candidate as `label_reliability` gives it).

    Raises:
        InputError: no candidates.
    """
    if not candidates:
        raise InputError("choose_label: expected at least one candidate, got none")
    table = {name: label_reliability(halves, bins) for name, halves in candidates.items()}
    return max(table, key=lambda name: table[name]["correlation"]), table


def _rows(tau: PairTau) -> dict[str, Any]:
    return {
        "filter": tau.tau,
        "filter_low": tau.low,
        "filter_high": tau.high,
        "macs_only": tau.reference,
        "difference_low": tau.difference_low,
        "difference_high": tau.difference_high,
        "num_pairs": tau.num_pairs,
    }


def _decision(within: PairTau, num_paths: int) -> tuple[bool, str]:
    if within.tau is None or within.difference_low is None:
        return False, "no two labelled paths share a budget bin: nothing to judge the filter by"
    text = (
        f"within-bin tau {within.tau:.3f} against {within.reference:.3f} by MACs alone, 95 % interval of the "
        f"difference {within.difference_low:+.3f} to {within.difference_high:+.3f} from {num_paths} paths"
    )
    if within.difference_low > 0.0:
        return True, text
    return False, text + ": not better with confidence; use balanced sampling"


def filter_report(
    flt: Any,
    paths: Any,
    labels: Any,
    macs_m: Any,
    *,
    resolutions: Any = None,
    label_halves: Any = None,
    label_sd: Any = None,
    num_bins: int = 8,
    num_folds: int = 5,
    num_bootstrap: int = 1000,
    seed: int = 0,
    png: str | FilePath | None = None,
    curve_shares: tuple[float, ...] = _CURVE_SHARES,
) -> dict[str, Any]:
    """Judge a filter on paths it has not seen.

    Args:
        flt: `PathFilter` or a rival; its settings are cross-validated, its fit (if any) is left alone.
        paths: n labelled paths, as `PathFilter.fit` takes them.
        labels: [n], larger is better.
        macs_m: [n], whole-detector MACs in millions.
        resolutions: [n], longest side of each path; None: read from the paths where the filter has a space.
        label_halves: [n, 2], each path's label on two halves of the label images.
        label_sd: As `PathFilter.fit`.
        num_bins: Budget bins of equal width in log MACs.
        num_folds: Of the cross-validation; fewer where labels are few.
        num_bootstrap: Resamples of the paths behind every interval.
        seed: Of folds, fits and bootstrap.
        png: Where to draw the report; None = nowhere.
        curve_shares: Shares of the labels, besides all, at which ``sample_efficiency`` is measured; each
            costs as much as the rest of the report.

    Returns:
        JSON-ready: ``tau`` (global, within_bins, local, within_bins_and_resolution; each with the filter, its
        95 % interval, ranking by MACs, and the interval of the difference), ``per_bin``, ``top_k_recall`` and
        ``regret`` (each with a 95 % interval over groups of one bin and fold), ``sample_efficiency`` (tau
        within bins by number of labels), ``label_reliability``, ``use_filter`` and ``reason``. Pairs are
        compared within a fold, where one model scored both.

    Raises:
        InputError: as `PathFilter.fit`, or fewer than 10 distinct paths.
    """
    encoding = flt.encoding
    codes_in = encoding.codes(paths)
    data = collect_labels(encoding, paths, labels, macs_m, label_sd=label_sd)
    n = len(data.labels)
    if n < 10:
        raise InputError(f"filter_report: expected at least 10 distinct labelled paths, got {n}")
    macs = np.exp(data.log_macs)
    bins = cost_bins(macs, num_bins)
    num_folds = max(2, min(num_folds, n // 5))
    rows = data.codes if encoding.space is not None else data.codes.astype(np.int64) - 1
    scores, fold = held_out_scores(
        flt, rows, data.labels, macs, bins=bins, num_folds=num_folds, label_sd=data.label_sd, seed=seed
    )
    side = _sides(encoding, codes_in, data.codes, resolutions)
    same_fold = fold[:, None] == fold[None, :]
    same_bin = same_fold & (bins[:, None] == bins[None, :])
    local = same_fold & (np.abs(data.log_macs[:, None] - data.log_macs[None, :]) <= np.log1p(_LOCAL))
    selections = {"global": same_fold, "within_bins": same_bin, "local_10_percent": local}
    if side is not None:
        selections["within_bins_and_resolution"] = same_bin & (side[:, None] == side[None, :])
    taus = {
        name: pair_tau(
            scores, data.labels, pairs, reference=data.log_macs, num_bootstrap=num_bootstrap, seed=seed
        )
        for name, pairs in selections.items()
    }
    use_filter, reason = _decision(taus["within_bins"], n)
    groups = bins * num_folds + fold
    curve = []
    for share in curve_shares:
        part, _ = held_out_scores(
            flt,
            rows,
            data.labels,
            macs,
            bins=bins,
            num_folds=num_folds,
            label_sd=data.label_sd,
            share=share,
            seed=seed,
        )
        curve.append(_curve_point(share, n, num_folds, tau_within_groups(part, data.labels, groups)))
    curve.append(_curve_point(1.0, n, num_folds, tau_within_groups(scores, data.labels, groups)))
    report: dict[str, Any] = {
        "num_labels": len(codes_in),
        "num_distinct": n,
        "num_folds": num_folds,
        "num_bins": num_bins,
        "empty_bins": [index for index in range(num_bins) if not (bins == index).any()],
        "macs_label_correlation": float(np.corrcoef(data.log_macs, data.labels)[0, 1])
        if np.ptp(macs)
        else 0.0,
        "tau": {name: _rows(tau) for name, tau in taus.items()},
        "per_bin": _per_bin(scores, data.labels, macs, bins, fold, num_bins),
        "top_k_recall": _beside(top_k_recall, scores, data, groups, num_bootstrap, seed),
        "regret": {
            **_beside(regret, scores, data, groups, num_bootstrap, seed),
            "random": _random_regret(data.labels, groups),
        },
        "sample_efficiency": curve,
        "label_reliability": _reliability(label_halves, codes_in, macs_m, num_bins),
        "use_filter": use_filter,
        "reason": reason,
    }
    if png is not None:
        plot_report(report, scores, data.labels, macs, png)
    return report


def _sides(encoding: Any, codes_in: np.ndarray, codes: np.ndarray, resolutions: Any) -> np.ndarray | None:
    """The resolution of each distinct path, or None where there is no such thing."""
    if resolutions is None:
        return codes[:, -1].astype(np.int64) if encoding.space is not None else None
    given = np.asarray(resolutions)
    if given.shape != (len(codes_in),):
        raise InputError(
            f"filter_report: expected shape [{len(codes_in)}] for resolutions, got {list(given.shape)}"
        )
    first = np.sort(np.unique(codes_in, axis=0, return_index=True)[1])
    return given[first]


def _random_regret(labels: np.ndarray, groups: np.ndarray) -> float:
    rows = [labels[groups == group] for group in np.unique(groups)]
    return float(np.mean([part.max() - part.mean() for part in rows]))


def _curve_point(share: float, num_paths: int, num_folds: int, tau: float) -> dict[str, Any]:
    num_labels = max(4, round(share * num_paths * (num_folds - 1) / num_folds))
    return {"num_labels": num_labels, "tau_within": None if np.isnan(tau) else tau}


def _beside(
    metric: Any, scores: np.ndarray, data: Any, groups: np.ndarray, num_bootstrap: int, seed: int
) -> dict[str, float]:
    """The filter's mean over groups with its 95 % interval from resampling groups, and ranking by MACs."""
    each = np.array(
        [
            metric(scores[rows], data.labels[rows], groups[rows])
            for rows in (np.flatnonzero(groups == group) for group in np.unique(groups))
        ]
    )
    draws = np.random.default_rng([seed, 0xB5]).integers(0, len(each), (num_bootstrap, len(each)))
    low, high = np.quantile(each[draws].mean(1), [0.025, 0.975])
    return {
        "filter": float(each.mean()),
        "filter_low": float(low),
        "filter_high": float(high),
        "macs_only": metric(data.log_macs, data.labels, groups),
    }


def _per_bin(
    scores: np.ndarray,
    labels: np.ndarray,
    macs: np.ndarray,
    bins: np.ndarray,
    fold: np.ndarray,
    num_bins: int,
) -> list[dict[str, Any]]:
    table = []
    for index in range(num_bins):
        rows = bins == index
        if not rows.any():
            table.append({"bin": index, "num_paths": 0})
            continue
        own = tau_within_groups(scores[rows], labels[rows], fold[rows])
        macs_only = tau_within_groups(np.log(macs[rows]), labels[rows], fold[rows])
        table.append(
            {
                "bin": index,
                "num_paths": int(rows.sum()),
                "low_m": float(macs[rows].min()),
                "high_m": float(macs[rows].max()),
                "tau": None if np.isnan(own) else own,
                "tau_macs_only": None if np.isnan(macs_only) else macs_only,
                "label_sd": float(labels[rows].std()),
            }
        )
    return table


def _reliability(halves: Any, codes: np.ndarray, macs_m: Any, num_bins: int) -> dict[str, Any] | None:
    if halves is None:
        return None
    values = np.asarray(halves, np.float64)
    if values.shape != (len(codes), 2):
        raise InputError(
            f"filter_report: expected shape [{len(codes)}, 2] for label_halves, got {list(values.shape)}"
        )
    bins = cost_bins(np.asarray(macs_m, np.float64), num_bins)
    return {"overall": label_reliability(values), "within_bins": label_reliability(values, bins)}


def plot_report(
    report: dict[str, Any], scores: np.ndarray, labels: np.ndarray, macs_m: np.ndarray, png: str | FilePath
) -> None:
    """Draw the report: taus beside ranking by MACs, tau per bin, tau by labels, labels over MACs by score.

    Args:
        report: What `filter_report` returns.
        scores: [n], held-out scores.
        labels: [n].
        macs_m: [n].
        png: File to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, curve, right = figure.subplots(1, 4)
    names = [name for name, row in report["tau"].items() if row["filter"] is not None]
    for offset, key, colour in ((-0.18, "filter", "tab:blue"), (0.18, "macs_only", "tab:gray")):
        values = [report["tau"][name][key] for name in names]
        left.bar(np.arange(len(names)) + offset, values, 0.34, color=colour, label=key.replace("_", " "))
    for place, name in enumerate(names):
        row = report["tau"][name]
        left.vlines(place - 0.18, row["filter_low"], row["filter_high"], color="black")
    left.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
    left.axhline(0.0, color="black", linewidth=0.5)
    left.set_title("Kendall tau, held-out paths, 95 % interval", fontsize=9)
    left.legend(fontsize=8)
    bins = [row for row in report["per_bin"] if row.get("tau") is not None]
    middle.plot([row["bin"] for row in bins], [row["tau"] for row in bins], "o-", label="filter")
    middle.plot(
        [row["bin"] for row in bins],
        [row["tau_macs_only"] or 0.0 for row in bins],
        "s--",
        color="tab:gray",
        label="macs only",
    )
    middle.set_xlabel("budget bin")
    middle.set_title("tau inside each bin", fontsize=9)
    middle.legend(fontsize=8)
    steps = [row for row in report["sample_efficiency"] if row["tau_within"] is not None]
    curve.plot([row["num_labels"] for row in steps], [row["tau_within"] for row in steps], "o-")
    curve.set_xlabel("labelled paths per fit")
    curve.set_title("tau inside bins by labels", fontsize=9)
    points = right.scatter(macs_m, labels, c=scores, s=12, cmap="viridis")
    right.set_xscale("log")
    right.set_xlabel("million MACs")
    right.set_ylabel("label")
    right.set_title("use_filter: " + str(report["use_filter"]).lower(), fontsize=9)
    figure.colorbar(points, ax=right, label="held-out score")
    figure.savefig(png, dpi=110, metadata={"Software": None})
