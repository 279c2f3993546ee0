"""The results page as HTML: web/index.html in English or French, with the numbers in it for those who run no script.

Pure: it is given the data of /results.json, and makes a text of it. The page's script writes the same words from the
same data (web/texts.json), and keeps them up to date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

FOLDER = Path(__file__).with_name("web")
LOCALES = {"en": "en_GB", "fr": "fr_FR"}  # as OpenGraph writes them
LANGUAGES = tuple(LOCALES)
MOST_ROWS = 100  # in the HTML; the script shows all
DRAWN_AT_ONCE = 20  # of them; the others where they are in sight
UNKNOWN = "\N{EN DASH}"
LONG_NUMBER = 14  # characters; longer ones are written smaller, as by the script

_PLACE = re.compile(r"\{\{(\w+)\}\}")
_TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")  # what would turn the direction of what stands beside a title
_LANGUAGE = re.compile(r"(fr|en)\b", re.IGNORECASE)
_QUALITY = re.compile(r"q=([0-9.]{1,5})")
LONGEST_ACCEPTED = 200  # characters of Accept-Language: what comes after them is not read


class PageTemplate:
    """The files of the page. The constructor reads them; raises OSError where one is not there."""

    def __init__(self, title: str | None, day: str | None) -> None:
        """``title`` and ``day`` (ISO 8601) of the vote, where they are given."""
        self.page = (FOLDER / "index.html").read_text(encoding="utf-8")
        self._texts = json.loads((FOLDER / "texts.json").read_bytes())
        self._title = title
        self._day = day

    def render(
        self, language: str, data: Mapping[str, Any] | None, law_id: str | None, chosen: bool, is_embedded: bool
    ) -> bytes:
        """The page in that language, of all laws or of one.

        ``data`` is that of /results.json, None where it cannot be read. ``chosen``: the language was asked for by the
        address, so that links keep it. ``is_embedded``: one law alone, for another site's frame.
        """
        words = _Words(language, self._texts[language])
        laws = [] if data is None else [law for law in data["laws"] if law_id in (None, law["law_id"])]
        heading = self._title or words["heading"]
        title = heading
        outcome = ""
        if law_id is not None and laws:
            title, outcome = f"{_shown_title(laws[0]) or law_id} \N{EN DASH} {heading}", words.outcome(laws[0])
        values = {name: escape(text) for name, text in words.texts.items()} | {
            "lang": language,
            "locale": LOCALES[language],
            "chosen": language if chosen else "",
            "law_id": escape(law_id or ""),
            "is_embedded": "1" if is_embedded else "",
            "page_title": escape(title),
            "description": escape(outcome or words["caption"]),
            "heading": escape(heading),
            "day": "" if self._day is None else escape(words.day(date.fromisoformat(self._day))),
            "votes_counted": UNKNOWN if data is None else words.number(data["votes_counted"]),
            "moment": escape(words["loading"] if data is None else words.data_of(data)),
            "switch": escape(_query(law_id, words["other"], is_embedded)),
            "all_laws_link": escape(_query(None, language if chosen else None, False)),
            **words.proof(None if data is None else data["proof"]),
            "keep_language": f"?lang={language}" if chosen else "",
            "rows": "".join(
                words.row(law, language if chosen else None, number >= DRAWN_AT_ONCE)
                for number, law in enumerate(laws[:MOST_ROWS])
            ),
            "not_in_html": words.not_in_html(len(laws)),
            "none_text": escape(words["none" if law_id is None else "no_such_law"]),
            "hides_none": " hidden" if laws or data is None else "",
            "hides_one": " hidden" if law_id is None else "",
            "hides_embargo": "" if data is not None and data["hides_open_laws"] else " hidden",
            "texts": json.dumps(words.texts, ensure_ascii=False).replace("<", "\\u003c"),
        }
        return _PLACE.sub(lambda place: values[place[1]], self.page).encode()


class _Words:
    """What the page says, in one language."""

    def __init__(self, language: str, texts: dict[str, str]) -> None:
        self.language = language
        self.texts = texts

    def __getitem__(self, name: str) -> str:
        return self.texts[name]

    def number(self, value: int) -> str:
        return f"{value:,}".replace(",", "\u202f") if self.language == "fr" else f"{value:,}"

    def percent(self, digits: str) -> str:
        return digits.replace(".", ",") + "\u00a0%" if self.language == "fr" else f"{digits}%"

    def votes(self, number: int) -> str:
        return self["vote_1"] if number == 1 else self["votes_n"].format(n=self.number(number))

    def day(self, day: date) -> str:
        ordinal = "er" if day.day == 1 and self.language == "fr" else ""
        return f"{day.day}{ordinal} {self['months'].split()[day.month - 1]} {day.year}"

    def moment(self, moment: str) -> str:
        """As people write it, in UTC: what the reader's time zone is, only a script knows. A dash where it is none."""
        try:
            at = datetime.fromisoformat(moment.replace("Z", "+00:00")).astimezone(UTC)
        except (ValueError, OverflowError):
            return UNKNOWN
        joint = " à " if self.language == "fr" else ", "
        return f"{self.day(at.date())}{joint}{at:%H:%M} UTC"

    def data_of(self, data: Mapping[str, Any]) -> str:
        return self["data_of"].format(moment=self.moment(data["read_at"]))

    def not_in_html(self, laws: int) -> str:
        if laws <= MOST_ROWS:
            return ""
        text = self["not_in_html"].format(all=self.number(laws), shown=self.number(MOST_ROWS))
        return f'{escape(text)}<a href="results.csv">results.csv</a>'

    def outcome(self, law: Mapping[str, Any]) -> str:
        if law["oui"] is None:
            return self["before" if law["state"] == "not_yet" else "hidden"]
        if law["state"] == "not_yet" and not law["total"]:
            return self["before"]
        kind = {"ended": "counting", "certified": "won"}.get(law["state"], "leads")
        return self[f"{kind}_{law['leader'] or 'none'}"].format(votes=self.votes(law["lead"]))

    def when(self, law: Mapping[str, Any]) -> str:
        """What the state does not say alone: until when, or whether the result is final."""
        state = law["state"]
        if state == "certified":
            return self["final"]
        name, moment = {
            "not_yet": ("opens", law["opens_at"]),
            "open": ("until", law["closes_at"]),
            "ended": ("ended_at", law["closes_at"]),
        }[state]
        said = [self[name].format(moment=self.moment(moment))] if moment else []
        return ", ".join(said + [self["not_final"]] * (state == "open" and law["leader"] is not None))

    def turnout(self, law: Mapping[str, Any]) -> str:
        if law["turnout_percent"] is None:
            return ""
        if law["total"] > law["eligible_voters"]:
            return self["over_turnout"].format(n=self.number(law["eligible_voters"]))
        return self["turnout"].format(percent=self.percent(law["turnout_percent"]))

    def proof(self, proof: Mapping[str, Any] | None) -> dict[str, str]:
        """The parts of the block that says how to check the result."""
        if proof is None:
            return {"hides_proof": " hidden", "seal": "", "sealed": "", "certificates": ""}
        items = []
        for made in proof["certificates"]:
            by = {"law": made["law_id"], "by": made["certified_by"], "moment": self.moment(made["certified_at"])}
            items.append(f"<li>{escape(self['certificate'].format(**by))} <code>{made['sha256']}</code></li>")
        sealed = escape(self["sealed"].format(moment=self.moment(proof["sealed_at"])))
        return {"hides_proof": "", "seal": proof["seal"], "sealed": sealed, "certificates": "".join(items)}

    def row(self, law: Mapping[str, Any], chosen: str | None, is_later: bool) -> str:
        """The row of one law, as the page's script makes it; ``is_later``: drawn only where it is in sight."""
        law_id = escape(law["law_id"])
        cells = {
            "outcome": escape(self.outcome(law)),
            "oui": self._number(law["oui"], "percent", self._share(law, "oui")),
            "share": f'<div class="around">{self._bar(law)}</div>',
            "non": self._number(law["non"], "percent", self._share(law, "non")),
            "total": self._number(law["total"], "turnout", self.turnout(law)),
            "state": f'<span class="status">{escape(self[law["state"]])}</span>'
            f'<span class="when">{escape(self.when(law))}</span>',
        }
        kinds = {name: f"{name} ahead" if name == law["leader"] else name for name in cells}
        labels = {name: f' data-label="{escape(self[name])}"' for name in ("oui", "non", "total")}  # on a phone
        title = escape(_shown_title(law))
        link = f' href="{escape(_query(law["law_id"], chosen, False))}">{law_id}' if title else ">"
        state = law["state"] + (" later" if is_later else "")
        return (
            f'<tr role="row" class="{state}" id="law-{law_id}"><th role="rowheader" scope="row" class="law">'
            f'<bdi class="title">{title or law_id}</bdi><a class="id"{link}</a></th>'
            + "".join(
                f'<td role="cell" class="{kinds[name]}"{labels.get(name, "")}>{content}</td>'
                for name, content in cells.items()
            )
            + "</tr>"
        )

    def _number(self, value: int | None, kind: str, beside: str) -> str:
        text = UNKNOWN if value is None else self.number(value)
        size = ' class="long"' if len(text) > LONG_NUMBER else ""
        return f'<b{size}>{text}</b><span class="{kind}">{escape(beside and f" {beside}")}</span>'

    def _share(self, law: Mapping[str, Any], choice: str) -> str:
        return self.percent(law[f"{choice}_percent"]) if law["total"] else ""

    def _bar(self, law: Mapping[str, Any]) -> str:
        if not law["total"]:
            label = self["hidden" if law["total"] is None else "no_votes"]
            return f'<svg class="bar" role="img" aria-label="{escape(label)}"></svg>'
        label = self["shares"].format(oui=self._share(law, "oui"), non=self._share(law, "non"))
        oui, non = law["oui_percent"], law["non_percent"]
        gap = f'<rect class="gap" x="{oui}%" width="4" height="100%"/>' if law["oui"] and law["non"] else ""
        return (
            f'<svg class="bar" role="img" aria-label="{escape(label)}"><rect class="for" width="{oui}%" height="100%"/>'
            f'<rect class="against" x="{oui}%" width="{non}%" height="100%"/>{gap}</svg>'
        )


def language_of(asked: str | None, accepted: str) -> str:
    """The language of the address (``lang``), else that which Accept-Language ranks highest, else English."""
    if asked in LANGUAGES:
        return asked
    ranked = []
    for part in accepted[:LONGEST_ACCEPTED].split(","):
        name, _, parameter = [text.strip() for text in part.partition(";")]
        language, quality = _LANGUAGE.match(name), _QUALITY.fullmatch(parameter or "q=1")
        if language and quality:
            try:
                ranked.append((float(quality[1]), language[1].lower()))
            except ValueError:
                continue
    best = max((quality for quality, _ in ranked), default=0)
    return next((language for quality, language in ranked if quality == best > 0), "en")


def _shown_title(law: Mapping[str, Any]) -> str:
    return _TURNING.sub("", law["title"] or "").strip()


def _query(law_id: str | None, language: str | None, is_embedded: bool) -> str:
    """The address of the page, or of one law of it."""
    parts = [f"law={quote(law_id, safe='')}"] if law_id is not None else []
    parts += [f"lang={language}"] if language is not None else []
    parts += ["embed=1"] if is_embedded else []
    return f"?{'&'.join(parts)}" if parts else "./"
