"""The figures of src/data/inspect.py as tables for the terminal, and as a picture."""

from collections.abc import Iterator

from src.data.inspect import RECORD_TOKENS, TOKENS, histogram, shorten
from src.files.text import text_width

MOST_ROWS = 20  # files or fields in a table; the JSON file has all
BAR = 40  # columns of the longest bar
STATISTICS = ("min", "median", "mean", "p95", "max")


def share(part: int, whole: int) -> str:
    """Returns a number with its percentage."""
    return f"{part:,} ({percent(part / max(1, whole))})"


def percent(value: float) -> str:
    """Returns a share as percent: 100 % and 0 % only if it is exactly that."""
    if 0 < value < 0.0005 or 0.9995 <= value < 1:
        return "< 0.1 %" if value < 0.5 else "> 99.9 %"
    return f"{100 * value:.1f} %" if 0 < value < 1 else f"{100 * value:.0f} %"


def table(head: list[str], rows: list[list[str]], left: int = 1) -> Iterator[str]:
    """Yields the lines of a table. The first `left` columns are aligned on the left, the others on the right."""
    widths = [max(map(text_width, column)) for column in zip(head, *rows)]
    for row in (head, *rows):
        gaps = [" " * (width - text_width(cell)) for cell, width in zip(row, widths)]
        cells = (cell + gap if i < left else gap + cell for i, (cell, gap) in enumerate(zip(row, gaps)))
        yield "  " + "  ".join(cells).rstrip()


def report(figures: dict) -> Iterator[str]:
    """Yields the lines of the whole report."""
    kind, n, files = figures["kind"], figures["n"], figures["files"]
    size = sum(figures["lengths"][name]["total"] for name in figures["lengths"] if name.endswith("characters"))
    where = next(iter(files)) if len(files) == 1 else f"{len(files)} files"
    yield f"{where}: {n:,} {kind}, {size:,} characters"
    if len(files) > 1:
        yield from ("", "files")
        yield from _limited(table(["file", kind], [[path, f"{number:,}"] for path, number in files.items()]))
    if figures["fields"]:
        yield from ("", "fields")
        yield from _limited(table(["field", "type", "not null"], list(map(_field, figures["fields"])), left=2))
    yield from ("", "lengths")
    rows = [
        [name, *(f"{values[each]:,.{each == 'mean':d}f}" for each in STATISTICS)]
        for name, values in figures["lengths"].items()
    ]
    yield from table(["", *STATISTICS], rows)
    yield from _histograms(figures["lengths"], kind)
    if "fit" in figures:
        yield from ("", f"max_seq_len {figures['fit']['max_seq_len']}")
        yield from _fit(figures["fit"], kind, n)
    yield from ("", "duplicates")
    yield from _duplicates(figures["duplicates"], kind, n)
    if "overlap" in figures:
        yield from ("", "overlap with the other set")
        yield from _overlap(figures["overlap"], "questions" if kind == "records" else "documents", n)
    if figures["skipped"]:
        yield from ("", "skipped")
        rows = [[reason, f"{number:,}"] for reason, number in figures["skipped"].items()]
        yield from table(["reason", "lines"], rows)
    for number, text in enumerate(figures["examples"], 1):
        yield from ("", f"example {number}")
        yield from _indented(text)


def _limited(lines):
    lines = list(lines)
    yield from lines[: MOST_ROWS + 1]
    if len(lines) > MOST_ROWS + 1:
        yield f"  and {len(lines) - MOST_ROWS - 1:,} more"


def _field(field):
    types, n = field["types"], max(1, sum(field["types"].values()))
    kinds = [kind if len(types) == 1 else f"{kind} {percent(number / n)}" for kind, number in types.items()]
    return [shorten(field["name"], 40), ", ".join(kinds), "-" if field["share"] is None else percent(field["share"])]


def _histograms(lengths, kind):
    """Yields the lines of histograms, in tokens if there are such lengths."""
    shown = [name for name in lengths if TOKENS in name] or lengths
    for name in shown:
        bins = lengths[name]["histogram"]
        most = max(number for _, _, number in bins)
        rows = [[_range(low, high), f"{number:,}", _bar(number / most)] for low, high, number in bins]
        head = [name, kind, ""]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(2)]
        yield ""
        for label, number, bar in (head, *rows):
            yield f"  {label.rjust(widths[0])}  {number.rjust(widths[1])}  {bar}".rstrip()


def _range(low, high):
    return f"{low:,} or more" if high is None else f"{low:,} to {high:,}" if high > low else f"{low:,}"


def _bar(part):
    """Returns a bar of BAR columns times `part`, in steps of an eighth of a column; at least one step if not empty."""
    eighths = max(round(8 * BAR * part), 1 if part else 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _fit(values, kind, n):
    longer = share(values["longer"], n)
    if kind == "records":
        yield f"  {longer} records are longer: training drops them"
        return
    if values["windows"]:
        yield f"  {values['windows']:,} windows of packed text, without loss"
    else:
        yield f"  the text has {values['tokens']:,} tokens, too few for one window of packed text"
    yield f"  {longer} documents are longer than one window"
    yield f"  with --packing false, {share(values['cut_tokens'], values['tokens'])} tokens would be cut off"


def _duplicates(values, kind, n):
    if not values["repeated_normalised"]:
        yield "  none, also if white space and case are ignored"
        return
    yield f"  {share(values['repeated'], n)} {kind} equal an earlier one"
    if kind == "records":
        yield f"  {share(values['repeated_questions'], n)} have the question of an earlier one"
    what = "questions" if kind == "records" else kind
    yield f"  {share(values['repeated_normalised'], n)} {what}, if white space and case are ignored"
    if values["first"] is not None:
        yield f"  the most frequent one occurs {values['most']:,} times, at first in {values['first']['place']}"
        yield f"  and {values['second']['place']}:"
        yield from _indented(values["first"]["text"])


def _overlap(values, what, n):
    yield f"  {share(values['exact'], n)} {what} are among its {values['other']:,} exactly"
    yield f"  {share(values['normalised'], n)} if white space and case are ignored"
    if values["example"] is not None:
        yield f"  the first is {values['example']['place']}:"
        yield from _indented(values["example"]["text"])


def _indented(text):
    return (f"    {line}".rstrip() for line in text.splitlines() or [""])


def draw_lengths(lengths: dict, figures: dict, path: str):
    """Draws the histogram of every length, with its median and 95th percentile, as a PNG.

    lengths: {name: {length: number}}, those of Measures. If `figures` has `fit`, documents beyond max_seq_len are
    orange."""
    from src.training.curves import BLUE, GREY, INK, ORANGE, add_title, new_figure, save_picture, style_axes

    columns = min(2, len(lengths))
    n_rows = -(-len(lengths) // columns)
    figure, _ = new_figure(2.8 * n_rows + 0.3)
    grid = figure.add_gridspec(n_rows, columns)
    limit = figures["fit"]["max_seq_len"] if "fit" in figures else None
    for number, (name, counts) in enumerate(lengths.items()):
        axes, bins = figure.add_subplot(grid[number // columns, number % columns]), histogram(counts, 40)
        style_axes(axes, name)
        width = (bins[0][1] or 0) - bins[0][0] + 1
        is_limited = limit is not None and name in (TOKENS, RECORD_TOKENS)
        places, heights = [low - 0.5 for low, _, _ in bins], [number for _, _, number in bins]
        colors = [ORANGE if is_limited and place >= limit - 1 else BLUE for place in places]
        bars = axes.bar(places, heights, width=0.9 * width, align="edge", color=colors)
        axes.set_ylabel(figures["kind"], fontsize=9, color="#555555")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
        top = 1.18 * max(heights)
        axes.set_ylim(0, top)
        if bins[-1][1] is None:
            bars[-1].set_alpha(0.5)
            x, y = places[-1] + 0.9 * width, max(heights[-1 - len(bins) // 6 :])  # above the neighbours as well
            axes.annotate("or more", (x, y), (0, 3), textcoords="offset points", ha="right", fontsize=8, color=GREY)
        for each in ("median", "p95"):
            value = figures["lengths"][name][each]
            axes.axvline(value, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.annotate(f" {each} {value:,}", (value, top), va="top", fontsize=8, color=INK)
        if is_limited and limit <= places[-1] + width:
            axes.axvline(limit, color=ORANGE, linewidth=1.2)
            axes.annotate(f" max_seq_len {limit:,}", (limit, 0.9 * top), va="top", fontsize=8, color=ORANGE)
    files = list(figures["files"])
    title = files[0] if len(files) == 1 else f"{len(files)} files"
    add_title(figure, title, f"{figures['n']:,} {figures['kind']}")
    return save_picture(figure, path)
