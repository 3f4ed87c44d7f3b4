"""Draw the figures of the tutorial from numbers and texts.

The tutorial computes what they show, with the project's own functions. Text and background have the colours of
`report.STYLE`, so that `make_tutorial.py` can replace them on dark pages.
"""

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
from IPython.display import Markdown, display
from matplotlib import pyplot, rcParams
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib_inline.backend_inline import set_matplotlib_formats

INK, PAPER, FAINT, LINE = "#1d2733", "#ffffff", "#6b7785", "#d9dfe6"
PERSONA, USER, BOT, OTHER = "#3fa34d", "#3f83e0", "#e08a2e", "#a45bc4"  # visible on white and on black
WIDTH = 9.0  # inches

set_matplotlib_formats("svg")
rcParams |= {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT, "grid.color": LINE,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.facecolor": PAPER, "legend.edgecolor": LINE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "font.size": 10,
    "svg.hashsalt": "tutorial", "figure.constrained_layout.use": True,
}


def say(text: str) -> None:
    """Show a sentence whose numbers a cell has computed."""
    display(Markdown(text))


def _canvas(height: float, columns: int = 1, **kwargs):
    """Create a figure as wide as the page, and return it with its axes."""
    return pyplot.subplots(1, columns, figsize=(WIDTH, height), **kwargs)


def _bare(axes) -> None:
    """Remove the frame, the ticks and the margins."""
    axes.set_axis_off()
    axes.margins(0)


def dialog(personas: Mapping[str, Sequence[str]], said: Sequence[str], speakers: Sequence[str]) -> None:
    """Draw what people say to each other as bubbles, the last speaker's on the right, and who they are beside them.

    ``personas``: sentences by name; ``speakers``: the name for each utterance of ``said``.
    """
    names = list(dict.fromkeys([*speakers, *personas]))
    right = speakers[-1]
    texts = [wrap(text, 44) for text in said]
    heights = [0.55 + 0.3 * len(lines) for lines in texts]
    notes = {name: [line for sentence in personas.get(name, ()) for line in wrap(f"· {sentence}", 27)]
             for name in names}
    height = max(sum(heights), *(0.6 + 0.28 * len(lines) for lines in notes.values()))
    figure, axes = _canvas(0.75 * height + 0.3)
    axes.set(xlim=(0, 12), ylim=(-height, 0.3))
    _bare(axes)
    for name in names:
        x, colour = (9.6, BOT) if name == right else (0, USER)
        axes.text(x, 0, name, color=colour, weight="bold", va="top")
        axes.text(x, -0.4, "\n".join(notes[name]), color=INK, va="top", size=8.5, linespacing=1.35)
    y = 0.0
    for lines, tall, name in zip(texts, heights, speakers, strict=True):
        wide = 0.4 + 0.103 * max(map(len, lines))
        x, colour = (9.3 - wide, BOT) if name == right else (2.7, USER)
        axes.add_patch(FancyBboxPatch((x, y - tall + 0.25), wide, tall - 0.25, facecolor=colour, alpha=0.22,
                                      edgecolor="none", boxstyle="round,pad=0,rounding_size=0.15"))
        axes.text(x + 0.17, y - (tall - 0.25) / 2, "\n".join(lines), va="center", size=9.5, linespacing=1.3)
        y -= tall
    pyplot.show()


def sequences(tokens: Sequence[str], rows: Mapping[str, Sequence[object]], colours: Sequence[str],
              per_line: int = 13) -> None:
    """Draw tokens in coloured boxes with the values of ``rows`` below; a long sequence takes several lines."""
    lines = -(-len(tokens) // per_line)
    tall = 1.2 + 0.62 * len(rows)
    figure, axes = _canvas(0.36 * lines * tall + 0.1)
    axes.set(xlim=(-1.7, per_line - 0.4), ylim=(-lines * tall + 0.4, 0.55))
    _bare(axes)
    for line in range(lines):
        y = -line * tall
        for number, name in enumerate(rows, 1):
            axes.text(-0.6, y - 0.62 * number, name, ha="right", va="center", color=FAINT, size=8.5)
        axes.text(-0.6, y, "token", ha="right", va="center", color=FAINT, size=8.5)
        for column, place in enumerate(range(line * per_line, min((line + 1) * per_line, len(tokens)))):
            axes.add_patch(FancyBboxPatch((column - 0.46, y - 0.33), 0.92, 0.66, facecolor=colours[place], alpha=0.3,
                                          edgecolor="none", boxstyle="round,pad=0,rounding_size=0.1"))
            axes.text(column, y, tokens[place], ha="center", va="center", size=8 if len(tokens[place]) < 9 else 6.5)
            for number, values in enumerate(rows.values(), 1):
                axes.text(column, y - 0.62 * number, values[place], ha="center", va="center", size=7.5, color=INK)
    pyplot.show()


def mask(visible: np.ndarray, segments: Sequence[int], names: Sequence[str]) -> None:
    """Draw which positions (columns) a position (row) may see, coloured by the segment that is seen.

    ``visible``: booleans (positions, positions); ``segments``: of each position its segment, named by ``names``.
    """
    figure, axes = _canvas(6.2)
    colours = [USER, BOT, PERSONA, OTHER, "#c94f6d"]
    segments = np.asarray(segments)
    for row, seen in enumerate(visible):
        for segment in np.unique(segments[seen]):
            places = np.flatnonzero(seen & (segments == segment))
            axes.broken_barh([(places[0], len(places))], (row, 1.04), facecolor=colours[segment % 5], linewidth=0)
    for edge in np.flatnonzero(np.diff(segments)) + 1:
        axes.axhline(edge, color=FAINT, linewidth=0.6)
        axes.axvline(edge, color=FAINT, linewidth=0.6)
    middles = [np.flatnonzero(segments == segment).mean() + 0.5 for segment in range(len(names))]
    axes.set(xlim=(0, len(segments)), ylim=(len(segments), 0), aspect="equal", xlabel="… may look at …",
             ylabel="a token of …")
    axes.set_xticks(middles, names, rotation=20)
    axes.set_yticks(middles, names)
    axes.tick_params(length=0)
    pyplot.show()


def bars(names: Sequence[str], values: Sequence[float], label: str, colours: Sequence[str] | None = None,
         texts: Sequence[str] | None = None, height: float | None = None) -> None:
    """Draw a horizontal bar for each name, with its value, or its text, at the end."""
    figure, axes = _canvas(height or 0.6 + 0.32 * len(names))
    places = range(len(names))
    axes.barh(places, values, color=colours or USER, height=0.7, alpha=0.85)
    for place, value in zip(places, values, strict=True):
        axes.text(max(value, 0), place, f"  {texts[place] if texts else f'{value:.2f}'}", va="center", size=9)
    axes.set(xlabel=label, ylim=(len(names) - 0.4, -0.6))
    axes.set_yticks(places, names)
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    pyplot.show()


def losses(tokens: Sequence[str], probabilities: Sequence[float]) -> None:
    """Draw the probability of each token of a reply, and what it adds to the loss."""
    figure, axes = pyplot.subplots(2, 1, figsize=(WIDTH, 4), sharex=True)
    places = range(len(tokens))
    axes[0].bar(places, probabilities, color=BOT, alpha=0.85)
    axes[0].set(ylabel="probability", ylim=(0, 1))
    nll = -np.log(probabilities)
    axes[1].bar(places, nll, color=OTHER, alpha=0.85)
    axes[1].axhline(nll.mean(), color=INK, linewidth=1, linestyle="--")
    axes[1].text(len(tokens) - 0.4, nll.mean(), f"mean\n{nll.mean():.2f}", va="center", size=9)
    axes[1].set(ylabel="−log probability\n(nats)", xlim=(-0.6, len(tokens) + 0.5))
    axes[1].set_xticks(places, tokens, rotation=35)
    pyplot.show()


def curves(values: Mapping[str, Sequence[float]], over: str, floor: Mapping[str, float] | None = None) -> None:
    """Draw the course of each of the ``values``, raw and smoothed; ``floor``: dashed lines, by label."""
    figure, axes = _canvas(3.4)
    for colour, (name, series) in zip((USER, BOT, PERSONA), values.items(), strict=False):
        steps = np.arange(1, len(series) + 1)
        axes.plot(steps, series, color=colour, alpha=0.35, linewidth=1)
        width = min(8, len(series))
        smooth = np.convolve(series, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1:], smooth, color=colour, linewidth=2.2, label=f"{name}, mean of {width}")
    for name, value in (floor or {}).items():
        axes.axhline(value, color=FAINT, linestyle="--", linewidth=1, label=name)
    axes.set(xlabel=over, ylabel="loss (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend()
    pyplot.show()


def ranks(found: Sequence[int], candidates: int, hits: Mapping[int, float]) -> None:
    """Draw the distribution of the right reply's rank, and hits@1 among fewer candidates."""
    figure, (left, right) = _canvas(3.2, 2)
    left.bar(range(1, candidates + 1), np.bincount(found, minlength=candidates + 1)[1:], color=USER, alpha=0.85)
    left.set(xlabel="rank of the right reply", ylabel="turns", xticks=(1, 5, 10, 15, candidates))
    right.plot(list(hits), list(hits.values()), "o-", color=BOT, label="the bot")
    right.plot(list(hits), [1 / number for number in hits], "o--", color=FAINT, label="by chance")
    right.set(xlabel="candidates to choose from", ylabel="hits@1", ylim=(0, 1.05), xticks=list(hits))
    right.grid(axis="y")
    right.legend()
    pyplot.show()


def next_tokens(panels: Mapping[str, tuple[Sequence[str], Sequence[float], int, int]]) -> None:
    """Draw the likeliest next tokens at several places, and where top-k and the nucleus cut them off.

    Each panel: tokens, probabilities, the size of top-k and that of the nucleus.
    """
    figure, axes = _canvas(4.2, len(panels))
    for one, (title, (tokens, probabilities, top_k, nucleus)) in zip(axes, panels.items(), strict=True):
        places = range(len(tokens))
        one.barh(places, probabilities, color=[PERSONA if place < nucleus else FAINT for place in places], alpha=0.8)
        one.axhline(top_k - 0.5, color=BOT, linewidth=1.5)
        one.text(1, top_k - 0.55, f"top-k: {top_k} tokens", color=BOT, ha="right", va="bottom", size=9)
        one.set_yticks(places, tokens)
        one.set(title=title, xlim=(0, 1), ylim=(len(tokens) - 0.4, -0.6), xlabel="probability")
        label = f"nucleus: {nucleus} token{'s' * (nucleus > 1)}"
        one.legend(handles=[Patch(color=PERSONA, alpha=0.8, label=label)], loc="lower right")
    pyplot.show()


def positions(series: Mapping[str, Sequence[Sequence[float]]], least: int = 10) -> None:
    """Draw the mean probability of the tokens at each position of several kinds of text, and their middle half.

    ``series``: for each kind, the probabilities of the tokens of each text; positions that fewer than ``least`` texts
    have are left out.
    """
    figure, axes = _canvas(3.6)
    for colour, (name, texts) in zip((USER, BOT, PERSONA), series.items(), strict=False):
        columns = [[text[place] for text in texts if len(text) > place] for place in range(max(map(len, texts)))]
        columns = [column for column in columns if len(column) >= least]
        steps = range(1, len(columns) + 1)
        axes.fill_between(steps, *np.array([np.quantile(column, (0.25, 0.75)) for column in columns]).T, color=colour,
                          alpha=0.15, linewidth=0)
        axes.plot(steps, [np.mean(column) for column in columns], "o-", color=colour, label=name, markersize=4)
    axes.set(xlabel="position in the reply", ylabel="probability of the token", ylim=(0, 1))
    axes.grid(axis="y")
    axes.legend()
    pyplot.show()


def compare(figures: Mapping[str, Mapping[str, float]], reference: str) -> None:
    """Draw a panel for each figure with a dot per name, and the line of the ``reference``.

    ``figures``: by name, the values by the figure's name.
    """
    kinds = list(next(iter(figures.values())))
    figure, axes = _canvas(0.7 + 0.36 * len(figures), len(kinds), sharey=True)
    figure.get_layout_engine().set(wspace=0.06)
    for one, kind in zip(axes, kinds, strict=True):
        values = [of[kind] for of in figures.values()]
        one.axvline(figures[reference][kind], color=FAINT, linestyle="--", linewidth=1)
        one.scatter(values, range(len(values)), color=[PERSONA if name == reference else BOT for name in figures], s=45)
        one.set(title=kind, xlim=(0, max(values) * 1.15 or 1))
        one.locator_params(axis="x", nbins=4)
        one.title.set_size(10)
        one.grid(axis="x")
    axes[0].set_yticks(range(len(figures)), list(figures))
    axes[0].set_ylim(len(figures) - 0.5, -0.5)
    pyplot.show()


def preferences(before: Sequence[float], after: Sequence[float]) -> None:
    """Draw the probability that the chosen reply of each pair is the better one, before and after the training."""
    figure, axes = _canvas(3.2)
    order = np.argsort(before)
    places = np.arange(1, len(before) + 1)
    low, high = np.asarray(before)[order], np.asarray(after)[order]
    axes.vlines(places, low, high, color=LINE, linewidth=3)
    axes.scatter(places, low, color=FAINT, label="before", zorder=3)
    axes.scatter(places, high, color=BOT, label="after", zorder=3)
    axes.axhline(0.5, color=FAINT, linestyle="--", linewidth=1)
    axes.set(xlabel="pairs of replies", ylabel="probability that\nthe chosen one is better", ylim=(0, 1.02),
             xticks=places)
    axes.legend(loc="lower right")
    pyplot.show()
