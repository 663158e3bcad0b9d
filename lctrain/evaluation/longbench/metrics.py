"""LongBench's metrics for English and code (Bai et al., arXiv:2308.14508): (reply, reference, classes) → 0 to 1.

They follow the published scripts (github.com/THUDM/LongBench) to the number, peculiarities included.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, str, Sequence[str]], float]


def qa_f1(reply: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return the F1 of the words of reply and reference, counted with repetitions, after SQuAD's normalisation."""
    ours, theirs = words(reply), words(reference)
    num_same = (Counter(ours) & Counter(theirs)).total()
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(ours), num_same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> list[str]:
    """Return the words of `text` in lower case, without ASCII punctuation, then without the articles a, an and the."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def rouge_l(reply: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return the F1 of ROUGE-L over a whole summary (Lin 2004), as the package rouge 1.0.1 defines it.

    Words are counted once. The words that count as recalled are the union, over all pairs of a sentence of the
    reference and one of the reply, of their longest common subsequences; sentences end at full stops.
    """
    ours, theirs = sentences(reply), sentences(reference)
    if not ours or not theirs:
        return 0.0
    common = {word for a in theirs for b in ours for word in longest_common_subsequence(a, b)}
    precision = len(common) / len({word for sentence in ours for word in sentence})
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def sentences(text: str) -> list[list[str]]:
    """Return the words of each sentence; a sentence of blanks has one empty word, as in the package rouge."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """Return the longest common subsequence; of several, the one that leaves out the latest words of `b` first."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, word in enumerate(a):
        for j, other in enumerate(b):
            longer = lengths[i][j] + 1 if word == other else max(lengths[i][j + 1], lengths[i + 1][j])
            lengths[i + 1][j + 1] = longer
    common, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            common.append(a[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common[::-1]


def classification(reply: str, reference: str, classes: Sequence[str]) -> float:
    """Return 1 / (number of classes that the reply names) if the reference is among them, else 0.

    A class that is a part of the reference does not count; but as the published loop deletes while it goes on, it does
    not look at the class that follows a deleted one.
    """
    named = [name for name in classes if name in reply]
    i = 0
    while i < len(named):
        if named[i] in reference and named[i] != reference:
            named.remove(named[i])
        i += 1
    return 1 / len(named) if reference in named else 0.0


def retrieval(reply: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the reply's numbers that are the reference's, which says "Paragraph <number>"."""
    found = re.search(r"Paragraph (\d+)", reference)
    return count(reply, found[1] if found else "")


def count(reply: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the reply's numbers that are the reference."""
    numbers = re.findall(r"\d+", reply)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def code_similarity(reply: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return how alike the reference and the reply's first line of code are, in whole hundredths.

    The line is the first without `, # and //. The measure is difflib's ratio, which fuzzywuzzy 0.18 computes where
    python-Levenshtein, which LongBench does not require, is not installed; that gives other numbers.
    """
    lines = reply.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
}
