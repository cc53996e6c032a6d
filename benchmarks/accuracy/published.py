"""Accuracies that others printed, none of them measured here, and where each was printed.

    python -m benchmarks.accuracy.published

prints all of them. Networks, augmentation and what batch norm does at test differ from row to row:
most are four convolution blocks of 32 or 64 filters, R2-D2's of 96, 192, 384 and 512.
"""

from collections.abc import Collection

from benchmarks.accuracy.settings import Setting
from memmeta.few_shot.algorithms import Name

SOURCES = {
    1: "Rajeswaran, Finn, Kakade, Levine (NeurIPS 2019), Table 2",
    2: "Raghu, Raghu, Bengio, Vinyals (ICLR 2020), Table 2; ± is one standard deviation over seeds",
    3: "Towards Fast Adaptation of Neural Architectures with Meta Learning (ICLR 2020), Table 2",
    4: "Lee, Maji, Ravichandran, Soatto (CVPR 2019), Table 1",
    5: "Lee, Maji, Ravichandran, Soatto (CVPR 2019), Table 2",
    6: "Meta-Learning in Reproducing Kernel Hilbert Space (ICLR 2021), Table 2",
    7: "Continuous-Time Meta-Learning with Forward Mode Differentiation (ICLR 2022), Table 2",
}

WAYS_AND_SHOTS = ((5, 1), (5, 5), (20, 1), (20, 5))
ROWS: tuple[tuple[int, str, Name, tuple[str, ...]], ...] = (
    (1, "omniglot", "maml", ("98.7 ± 0.4", "99.9 ± 0.1", "95.8 ± 0.3", "98.9 ± 0.2")),
    (1, "omniglot", "fomaml", ("98.3 ± 0.5", "99.2 ± 0.2", "89.4 ± 0.5", "97.9 ± 0.1")),
    (1, "omniglot", "reptile", ("97.7 ± 0.0", "99.5 ± 0.1", "89.4 ± 0.1", "97.1 ± 0.3")),
    (1, "omniglot", "imaml", ("99.2 ± 0.4", "99.7 ± 0.1", "94.5 ± 0.4", "98.7 ± 0.1")),
    (2, "omniglot", "anil", ("", "", "96.2 ± 0.5", "98.0 ± 0.3")),
    (3, "omniglot", "meta_sgd", ("99.53 ± 0.26", "99.93 ± 0.09")),
    (5, "cifar_fs", "maml", ("58.9 ± 1.9", "71.5 ± 1.0")),
    (5, "cifar_fs", "protonet", ("55.5 ± 0.7", "72.0 ± 0.6")),
    (5, "cifar_fs", "r2d2", ("65.3 ± 0.2", "79.4 ± 0.1")),
    (6, "fc100", "maml", ("38.00 ± 1.95", "49.34 ± 0.97")),
    (6, "fc100", "fomaml", ("37.73 ± 1.93", "49.05 ± 0.99")),
    (6, "fc100", "reptile", ("38.40 ± 1.94", "50.50 ± 0.87")),
    (6, "fc100", "imaml", ("38.38 ± 1.70", "49.41 ± 0.80")),
    (5, "fc100", "protonet", ("35.3 ± 0.6", "48.6 ± 0.6")),
    (4, "mini_imagenet", "maml", ("48.70 ± 1.84", "63.11 ± 0.92")),
    (6, "mini_imagenet", "fomaml", ("48.07 ± 1.75", "63.15 ± 0.91")),
    (6, "mini_imagenet", "reptile", ("49.70 ± 1.83", "65.91 ± 0.84")),
    (6, "mini_imagenet", "imaml", ("49.30 ± 1.88", "64.89 ± 0.95")),
    (2, "mini_imagenet", "anil", ("46.7 ± 0.4", "61.5 ± 0.5")),
    (7, "mini_imagenet", "meta_sgd", ("50.47 ± 1.87", "64.03 ± 0.94")),
    (4, "mini_imagenet", "protonet", ("49.42 ± 0.78", "68.20 ± 0.66")),
    (4, "mini_imagenet", "r2d2", ("51.2 ± 0.6", "68.8 ± 0.1")),
    (4, "tiered_imagenet", "maml", ("51.67 ± 1.81", "70.30 ± 1.75")),
    (7, "tiered_imagenet", "imaml", ("38.54 ± 1.37", "60.24 ± 0.76")),
    (7, "tiered_imagenet", "anil", ("49.35 ± 0.26", "65.82 ± 0.12")),
    (7, "tiered_imagenet", "meta_sgd", ("52.80 ± 0.44", "62.35 ± 0.26")),
    (4, "tiered_imagenet", "protonet", ("53.31 ± 0.89", "72.69 ± 0.74")),
)
"""Source, data set, method, and a figure for each of `WAYS_AND_SHOTS`."""

PUBLISHED: dict[tuple[Setting, str], tuple[str, int]] = {
    (Setting(data, *ways_and_shots), method): (figure, source)
    for source, data, method, figures in ROWS
    for ways_and_shots, figure in zip(WAYS_AND_SHOTS, figures, strict=False)
    if figure
}
"""By setting and method: accuracy in % as printed, and its number in `SOURCES`."""


def table() -> str:
    """All of them in Markdown, and the sources."""
    of_settings = [f"{ways}-way {shots}-shot" for ways, shots in WAYS_AND_SHOTS]
    rows = [["data", "method", *of_settings, "source"], ["---"] * (len(of_settings) + 3)]
    for source, data, method, figures in ROWS:
        missing = [""] * (len(WAYS_AND_SHOTS) - len(figures))
        rows.append([data, method, *figures, *missing, f"[{source}]"])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *sources(SOURCES)])


def sources(numbers: Collection[int]) -> list[str]:
    """A line for each of some sources."""
    return [f"- [{number}] {text}." for number, text in SOURCES.items() if number in numbers]


if __name__ == "__main__":
    print(table())
