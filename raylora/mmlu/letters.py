"""Reads which letter a written answer names: A to D of four choices, A to J of ten.

    text       <think>...</think> **Option A** is wrong, so it must be \\boxed{B}.
    made plain Option A is wrong, so it must be  answer: (B).
    mentions          A rejected: "is wrong" behind it     B chosen: "answer:" before it

The text is made plain first: full-width letters, LaTeX, markdown and other scripts' brackets become ASCII. Then the
words just before and just behind each letter that stands alone say whether it is chosen, rejected or only mentioned.
What a person would not be sure of is unparsed: a wrong letter spoils a score without a trace, an unparsed answer is
counted. The lists of words are of the languages in which models answer most. A letter beyond the choices is none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from raylora.mmlu.questions import LETTERS

# Marks of a thinking part: <think>, <thought>, <seed:think>, [THINK], <|START_THINKING|> ... and their closing forms.
_NAMES = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad)"
_OPENS = re.compile(rf"<{_NAMES}>|\[{_NAMES}\]|<\|START_{_NAMES}\|>|<\|channel\|>analysis(?:<\|message\|>)?", re.I)
_CLOSES = re.compile(rf"</{_NAMES}>|\[/{_NAMES}\]|<\|END_{_NAMES}\|>|<\|channel\|>final(?:<\|message\|>)?", re.I)


def marks_thought(text: str) -> bool:
    """Whether there is any mark of a thinking part in a text."""
    return bool(_OPENS.search(text) or _CLOSES.search(text))


def open_thought(text: str) -> str | None:
    """The mark of the thinking part in which a text ends; None where it ends in none."""
    marks = sorted([*_OPENS.finditer(text), *_CLOSES.finditer(text)], key=lambda match: match.start())
    return marks[-1][0] if marks and _OPENS.fullmatch(marks[-1][0]) else None


def closing_mark(opening: str) -> str:
    """The mark that closes a thinking part: ``</think>`` for ``<think>``, ``<|END_...|>`` for ``<|START_...|>``."""
    if opening.upper().startswith("<|START"):
        return opening.replace("START", "END").replace("start", "end")
    return f"{opening[0]}/{opening[1:]}"


def behind_thought(text: str) -> str | None:
    """What stands behind the thinking parts of a text; None where thinking is cut off."""
    closings = list(_CLOSES.finditer(text))
    rest = text[closings[-1].end() :] if closings else text
    return None if _OPENS.search(rest) else rest


# What a letter is, in plain text

_WORD = "A-Za-z0-9À-ɏЀ-ӿ"
# No part of a word or a number (Dogs, B12, C-section, D'accord, a.m., C++), and no unit (25 C, 25 °C).
_BEFORE, _BEHIND = (
    rf"(?<![{_WORD}°.'’])(?<![{_WORD}]-)(?<!\d )",
    rf"(?![{_WORD}+#%°]|['’][{_WORD}]|-[{_WORD}]|\.[{_WORD}])",
)
_IN_EQUATION = re.compile(rf"\s*[=+*/^]\s*[{_WORD}]")
# Words that follow the letter A, where it is no article: "A is right", "A because ...".
_AFTER_A = (
    r"(?:is|was|isn't|wasn't|are|seems?|looks|appears|sounds|must|should|would|has|does|can|cannot|can't|because|since|as|"
    r"and|or|nor|but|not|rather|instead|if|for|with|due|which|est|es|ist|und|oder|et|ou|o|y|e|weil|car|porque|это|верн\w+)\b"
)
_WORD_BEHIND = re.compile(rf"\s+(?!{_AFTER_A})[{_WORD}]", re.I)
# The same for the letter I, which is a pronoun before all others: "I was", "I should", "I, too".
_AFTER_I = (
    r"(?:is|isn't|seems|looks|appears|sounds|has|does|because|since|as|and|or|nor|but|not|rather|instead|if|for|with|"
    r"due|which|est|es|ist|und|oder|et|ou|o|y|e|weil|car|porque|это|верн\w+)\b"
)
_PRONOUN_BEHIND = re.compile(
    rf"\s+(?!{_AFTER_I})[{_WORD}]|\s*,\s*(?:the|an?|for one|as|too|personally|myself|like|however|therefore)\b", re.I
)
_NUMERALS = re.compile(r"\b(?:II|III|IV)\b")

# What the words around it say

_SENTENCES = re.compile(r"(?<=[.!?;])(?<!\bvs\.)\s+|(?<=[。！？])|\n+")
_NEXT_QUESTION = re.compile(r"\n\s*(?:question|q)\s*\d*\s*[:.]", re.I)
_CLAUSE = re.compile(
    r"[,;:—–、]|\b(?:but|so|because|since|therefore|hence|thus|while|whereas|mais|donc|car|sino|pero|aber|sondern|daher|"
    r"weil|а|но)\b|因此|所以|因为|而|但|故",
    re.I,
)
_NOT = (
    r"(?:n['’]t\b|\b(?:not|cannot|never|neither|nor|except(?: for)?|other than|rather than|instead of|than|exclud\w+|"
    r"eliminat\w+|rul\w+ out|against|unlike|versus|vs|reject\w*|dismiss\w*|"
    r"(?:all|any(?:thing)?|every(?:thing)?|nothing|none) but|nicht|keine?|pas|no es|non è|não é|но не|не)\b\.?|"
    r"不|非|排除|除了)"
)
_NEGATED = re.compile(_NOT, re.I)
_HEDGED = re.compile(
    r"\b(?:could|might|may|if|whether|unless|suppose|assuming|either|between|oder ob|si|wenn)\b|如果", re.I
)
_VERB = (
    r"(?:is|was|are|be|being|seems?|looks|appears|est|es|ist|lautet|wäre|è|é|er|är|jest|to|là|adalah|это|是|为|為|は|은|는|"
    r"가|が|=)"
)
_FILLER = (
    r"(?:[\s:=(>~—–→、-]|\b(?:the|la|el|le|die|der|das|den|lo|clearly|definitely|probably|most|likely|therefore|thus|then|"
    r"indeed|actually|simply|just|surely|certainly|obviously|correct|right|best|final|single|letter|labell?ed|number|"
    r"options?|choices?|opción|opção|opzione|lettre|letra|буква)\b|选项?|選択肢|よって)*"
)
_ANSWER = (
    r"(?:\b(?:answers?|ans|solution|response|réponse|reponse|respuesta|antwort|lösung|risposta|resposta|odpowied[źz]|"
    r"svar\w*|antwoord|cevap|jawaban\w*|đáp án|ответ\w*)|答案|答え?|正解|正答|정답|답|उत्तर|الإجابة|الجواب)"
)
_OPTION = (
    r"(?:\b(?:options?|choices?|letter|alternative|selection|guess|pick|verdict|conclusion|one|statement|opción|opção|"
    r"opzione|alternativa|вариант)|选项|選択肢)"
)
_UP_TO_VERB = rf"[^.!?;:()]{{0,60}}?(?<![{_WORD}]){_VERB}(?![{_WORD}])"
# "The answer is C", "answer: C", "the best option among these is C".
_SAYS_ANSWER = re.compile(
    rf"(?:{_ANSWER}(?:{_UP_TO_VERB}|\s*['’]s\b)?|{_OPTION}(?:{_UP_TO_VERB}|\s*:)|\bcorrect(?:\s+is)?\s*:?){_FILLER}(?:\ba\s)?$",
    re.I,
)
# "It is C", "I would say C", "so C", "option C".
_CHOOSES = re.compile(
    r"(?:\b(?:(?:it|that|this)(?:['’]s|\s+(?:is|was|must be|should be|would be|has to be|will be))|must be|should be|"
    r"has to be|say|says|choose|chose|choosing|pick|picked|picking|select|selected|selecting|guess|think|believe|"
    r"(?:go|went|going|gone)\s+(?:with|for)|opt(?:ing|ed)? for|vote for|bet on|answer|so|thus|therefore|hence|then|"
    r"definitely|probably|clearly|certainly|obviously|maybe|perhaps|likely|surely|finally|options?|choices?|letter|"
    r"c['’]est|es|ist|è|é|jest|wähle|nehme|würde|elijo|diría|entonces|choisis|dirais|scelgo|sia|escolho|diria|donc|also|daher|leaving|leaves|opción|opção|opzione|вариант|"
    rf"выбираю)|选择?|选项|選ぶ?|应选|故|是|だから)[\s,:]*{_FILLER}$",
    re.I,
)
_BUT = re.compile(rf"(?:\b(?:but|sino|sondern|mais|ma|mas|а)\b|而是){_FILLER}$", re.I)
_IS = (
    r"(?:\b(?:is|was|are|were|seems?|looks?|appears?|sounds?|must|would|should|can|could|has|to|be|being|est|es|ist|sind|"
    r"sont|son|sono|è|é|er|är|jest|это|the|an?|la|le|el|die|der|only|most|more|clearly|definitely|indeed|also|both|all|"
    r"obviously|probably|likely|simply|my|our|one|that|option|choice|therefore|bonne|buena|which)\b|是|为|が|は|가|이|"
    r"[:—–,\s-])*"
)
_IS_RIGHT = re.compile(
    rf"\)?(?=\s*(?:[:—–✓✔✅是为がは가이对正]|-\s|\w)){_IS}(?:(?:correct\w*|right(?![\w-])|true|best|better|answer|accurate|"
    r"valid|appropriate|(?:bonne|juste|vrai)\w*|richtig\w*|korrekt\w*|cert[ao]|giust[ao]|corrett[ao]|corret[ao]|верн\w*|"
    r"правильн\w*|respuesta|réponse|antwort|risposta|resposta)\b|正确|正確|对|對|正しい|正解|答案|맞|정답|✓|✔|✅)",
    re.I,
)
_GUESSED = re.compile(r"\b(?:would|could|seems?|looks?|appears?|sounds?)\b", re.I)
_WRONG = (
    rf"(?!\)?\s*,\s*not\b)\)?{_IS}(?:(?:not|isn['’]t|aren['’]t|wasn['’]t|can(?:no|['’])t|doesn['’]t|don['’]t|won['’]t|wrong|incorrect\w*|"
    r"false|untrue|invalid|out|eliminated|excluded|ruled out|irrelevant|unlikely|impossible|nicht|n['’]est pas|no es|"
    r"non è|não é|falsch\w*|fau[xs]\w*|fals[ao]|errad[ao]|errat[ao]|sbagliat[ao]|inkorrekt\w*|не|неверн\w*|"
    r"неправильн\w*)\b|错|錯|不|ではない|じゃない|は違|間違|틀|아니|✗|✘|❌)"
)
_END_OF_CLAUSE = re.compile(
    r"\)?\s*(?:$|[.,;:!)。，—–-]|\b(?:because|since|as|for|and|but|over|which|with|due|given|not|rather|instead|here|weil|car|sagen|"
    r"porque|perché)\b|[が를です이])",
    re.I,
)
_GREETING = re.compile(
    r"(?:[✓✔✅→=>\s,!.:(]|\b(?:yes|sure|okay|ok|well|hmm+|right|of course|certainly|thanks|oui|sí|ja|да|sim|"
    r"d['’]accord|as far as i (?:can tell|know)|in my (?:opinion|view)|personally)\b|是的|好的|嗯)*",
    re.I,
)
_AT_LAST = re.compile(
    r"\b(?:but|however|final(?:ly)?|therefore|thus|hence|so|wait|actually|correction|sorry|instead|conclusion|overall|no|"
    r"donc|daher|also)\b|因此|所以|综上|故|最终",
    re.I,
)


class _Patterns:
    """The patterns in which the letters of so many choices stand."""

    def __init__(self, num_choices: int) -> None:
        upper = f"A-{LETTERS[num_choices - 1]}"
        either = f"{upper}{upper.lower()}"
        # As the second of two letters, I is none in "H, I think".
        no_pronoun = rf"(?!I['’]|I(?i:{_PRONOUN_BEHIND.pattern}))"
        joined = (
            rf"(?!\s*,\s*[{upper}]\)?\s+(?:is|was|isn|can|could|seems)\b)"  # the next letter begins a sentence
            r"(?:\s*[,/&|\\]\s*(?:and|or|und|oder|et|ou)?|"
            r"\s+(?:and/or|and|or|nor|und|oder|et|ou|y|o|e|и|или)\b|\s*(?:和|或|与|及|、|か|と))"
            rf"\s*(?:(?:options?|choices?)\s+)?{no_pronoun}"
        )
        second = upper.replace("A-", "B-").lower()
        self.letter = re.compile(rf"{_BEFORE}([{either}]){_BEHIND}")
        self.letters = re.compile(
            rf"\(?{_BEFORE}(?:[{upper}]{_BEHIND}\)?(?:{joined}\(?[{upper}]{_BEHIND}\)?)*|"
            rf"[{upper.lower()}]{_BEHIND}\)?(?:{joined}\(?[{second}]{_BEHIND}\)?)*)"
        )
        self.alone = re.compile(rf"[\s(]*([{either}])[\s).,:;!?。]*")
        self.label = re.compile(rf"\s*\(?[{either}](?:\)[.:]?|[.:]|\s+[—–-]\s)")
        self.first_label = re.compile(rf"\s*\(?[{upper}](?:[.):])")
        self.a_or_label = re.compile(rf"A\s*:[\s(]*[{upper.replace('A-', 'B-')}][\s).]*")
        # But not in "B, not A", where the word rejects the next letter.
        self.is_wrong = re.compile(rf"{_WRONG}(?!\s*(?:options?\s+|choices?\s+)?\(?[{upper}](?![{_WORD}]))", re.I)
        self.tag = re.compile(
            r"\\(?:text|math|bf|rm|it|left|right|quad)\w*|\\[A-Za-z]+(?:\{[^{}]*\})*|"
            rf"</?(?![{upper}]>)[A-Za-z]\w*/?>|\\(?=\W)"
        )
        marks = r"[*_`$\"'‘’~|<>]+"
        self.marked = re.compile(rf"(?<![{_WORD}]){marks}\s*\(?([{either}])([.):]?)\s*{marks}(?![{_WORD}])[):.]?")
        self.bracketed = re.compile(rf"\(\s*([{either}])\s*([.:]?)\s*\)")
        self.with_s = re.compile(rf"(?<![{_WORD}])([{upper}])['’]s\b")


_patterns = cache(_Patterns)

_LOOKED_AT = 200
"""Characters before and behind a letter that are looked at: in long sentences without an end the words are searched in
square time."""


class _Choice(NamedTuple):
    letter: str
    strength: int
    """3: named as the answer or as right; 2: chosen in other words, or all there is; 1: in brackets, behind a colon, or
    left where others are rejected."""
    is_last_word: bool
    """Whether the words before it say that it replaces or concludes what came before."""


def read_letter(text: str, num_choices: int = 4) -> int | None:
    """The index of the choice that a written answer names; None where it names none of ``num_choices`` clearly."""
    known = _patterns(num_choices)
    visible = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    rest = behind_thought(visible)
    letter = _letter_of(_plain(rest, known), known) if rest is not None else None
    return None if letter is None else LETTERS.index(letter.upper())


def _plain(text: str, known: _Patterns) -> str:
    """Text without LaTeX, markdown and quotation marks; a single letter that was marked is in brackets, ``(C)``."""
    text = re.sub(r"\\(?:boxed|fbox)\b\s*|<(?:final[ _]?)?answer>|####", " answer: ", text)
    text = re.sub(r"\\[()\[\]]", "$", text)
    text = known.tag.sub(" ", text)
    text = re.sub(r"^[ \t]*>[ \t]+", "", text, flags=re.M)  # a quotation
    text = text.translate(
        str.maketrans("{}[]【】〔〕「」『』《》〈〉“”«»„‹›", "()()" + "()" * 5 + "()" + '""""' + '"""')
    )
    text = known.marked.sub(r"(\1) ", text)
    text = re.sub(r"[*`$~\"|<>]|(?<!\w)_+|_+(?!\w)|^[ \t]*(?:#{1,6}|[-•+]|\d+[.)])[ \t]+", "", text, flags=re.M)
    text = re.sub(r"\(\s*(?=\()|\)\s*(?=\))", "", text.replace("_", " "))
    text = known.bracketed.sub(r"(\1)", text)
    return known.with_s.sub(r"\1 is", text).strip()


def _letter_of(text: str, known: _Patterns) -> str | None:
    if alone := known.alone.fullmatch(text):
        return alone[1]
    if known.a_or_label.fullmatch(text):
        return None  # an answer of B, or a label before something else
    text = _NEXT_QUESTION.split(text)[0]
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and (alone := known.alone.fullmatch(lines[0])):
        return alone[1]
    if known.first_label.match(text) and not _lists_options(lines):
        # What follows the first paragraph may be the next question, which some models write themselves.
        text = re.split(r"\n\s*\n", text)[0]
    choices = list(_choices(text, known))
    for strength in (3, 2, 1):
        if of_strength := [choice for choice in choices if choice.strength == strength]:
            if len({choice.letter for choice in of_strength}) == 1 or of_strength[-1].is_last_word:
                return of_strength[-1].letter
            return None
    return None


def _lists_options(lines: list[str]) -> bool:
    """Whether a text begins with a list of the options: ``A. ...``, and ``B. ...`` in the next line."""
    return len(lines) > 1 and all(
        re.match(rf"\s*\(?{letter}[.):]", line) for letter, line in zip("AB", lines, strict=False)
    )


def _choices(text: str, known: _Patterns) -> Iterator[_Choice]:
    """The letters that a plain text chooses, in its order."""
    has_numerals = bool(_NUMERALS.search(text))
    rejected: set[str] = set()
    found: list[_Choice] = []
    place = since = 0
    first = len(text) - len(text.lstrip(" (\n"))
    for sentence in _SENTENCES.split(text):
        place = text.index(sentence, place)
        for match in known.letters.finditer(sentence):
            letters = known.letter.findall(match[0])
            before = sentence[max(match.start() - _LOOKED_AT, 0) : match.start()]
            behind = sentence[match.end() : match.end() + _LOOKED_AT]
            if not _is_mention(letters, before, match[0], behind, known):
                continue
            if has_numerals and "I" in letters and not _SAYS_ANSWER.search(before):
                continue  # "I and II are true"
            if _is_rejected(before, behind, known):
                rejected |= {letter.upper() for letter in letters}
                continue
            if len({letter.upper() for letter in letters}) > 1:
                continue  # "A or B": two are named, and none is chosen
            strength = _strength(before, match[0], behind, is_first=place + match.start() <= first)
            if not strength and rejected and before.rstrip().endswith(",") and not behind.strip(" ).!"):
                strength = 1  # "Since A is wrong, B"
            if strength and not (sentence.rstrip().endswith("?") and len(sentence.strip()) > 4):
                so_far = text[since : place + match.start()]
                found.append(
                    _Choice(letters[0].upper(), strength, bool(_AT_LAST.search(so_far) or _BUT.search(before)))
                )
                since = place + match.end()
        place += len(sentence)
    yield from (choice for choice in found if choice.letter not in rejected)


def _is_mention(letters: list[str], before: str, match: str, behind: str, known: _Patterns) -> bool:
    """Whether single letters stand for options.

    An ``A`` may be an article and an ``I`` a pronoun; small letters are most often words.
    """
    bracketed = match.startswith("(") and match.endswith(")")
    if bracketed:
        return True
    if _IN_EQUATION.match(behind):
        return False
    last = letters[-1]
    at_start = not before.strip()
    if last == "A" and not match.endswith(")") and _WORD_BEHIND.match(behind):
        return False
    if last == "I" and not match.endswith(")") and _PRONOUN_BEHIND.match(behind):
        return False
    if all(letter.isupper() for letter in letters):
        return True
    if len(letters) > 1:
        return False
    if at_start and known.label.match(match + behind):
        return last != "a" or match.endswith(")")
    if last == "a":
        return bool(re.search(r":\s*$", before) and re.match(r"\s*(?:$|[.,;)!])", behind))
    is_right = re.fullmatch(r"\s*(?:(?:option|choice)\s+)?", before, re.I) and _IS_RIGHT.match(behind)
    return bool(is_right or ((_SAYS_ANSWER.search(before) or _CHOOSES.search(before)) and _END_OF_CLAUSE.match(behind)))


def _is_rejected(before: str, behind: str, known: _Patterns) -> bool:
    """Whether the words around a letter say that it is not the answer."""
    clause = _CLAUSE.split(before)[-1]
    return bool(known.is_wrong.match(behind) or (_NEGATED.search(clause) and not _is_but(before)))


def _is_but(before: str) -> bool:
    """Whether a letter stands behind "not A but", in any of the languages."""
    but = _BUT.search(before)
    return bool(but and _NEGATED.search(before[: but.start()]))


def _strength(before: str, match: str, behind: str, is_first: bool) -> int:
    """How clearly the words around a letter say that it is the answer, see ``_Choice``; 0 if it is only mentioned."""
    if _HEDGED.search(_CLAUSE.split(before)[-1]):
        return 0
    is_right = _IS_RIGHT.match(behind)
    if (is_right and not _GUESSED.search(is_right[0])) or _SAYS_ANSWER.search(before):
        return 3
    if is_first or is_right or _is_but(before):
        return 2
    if not _END_OF_CLAUSE.match(behind):
        return 0
    if _CHOOSES.search(before) or _GREETING.fullmatch(before):
        return 2
    return 1 if match.startswith("(") or before.rstrip().endswith(":") else 0
