"""The results page as HTML: web/index.html in English or French, with the numbers in it for those who run no script.

Pure: it is given the data of /results.json, and makes a text of it. The page's script writes the same words from the same
data (web/texts.json), and keeps them up to date.
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
LANGUAGES = ("en", "fr")
LONG_NUMBER = 14  # characters; longer ones are written smaller, as by the script
MONTHS = {
    "en": "January February March April May June July August September October November December".split(),
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre".split(),
}

_PLACE = re.compile(r"\{\{(\w+)\}\}")
_TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")  # what would turn the direction of what stands beside a title
_LANGUAGE = re.compile(r"\s*(fr|en)\b[^;]*(?:;\s*q=([0-9.]+))?\s*", re.IGNORECASE)


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
            title, outcome = f"{_shown_title(laws[0]) or law_id} – {heading}", words.outcome(laws[0])
        values = {name: escape(text) for name, text in words.texts.items()} | {
            "lang": language,
            "chosen": language if chosen else "",
            "law_id": escape(law_id or ""),
            "is_embedded": "1" if is_embedded else "",
            "page_title": escape(title),
            "description": escape(outcome or words["caption"]),
            "heading": escape(heading),
            "day": "" if self._day is None else escape(words.day(date.fromisoformat(self._day))),
            "votes_counted": "–" if data is None else words.number(data["votes_counted"]),
            "moment": escape(words["loading"] if data is None else words.data_of(data)),
            "switch": escape(_query(law_id, words["other"], is_embedded)),
            "all_laws_link": escape(_query(None, language if chosen else None, False)),
            "rows": "".join(words.row(law, language if chosen else None) for law in laws),
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
        return f"{day.day}{'er' if day.day == 1 and self.language == 'fr' else ''} {self._month(day)} {day.year}"

    def _month(self, day: date) -> str:
        return MONTHS[self.language][day.month - 1]

    def moment(self, moment: str) -> str:
        """As people write it, in UTC: what the reader's time zone is, only a script knows."""
        at = datetime.fromisoformat(moment.replace("Z", "+00:00")).astimezone(UTC)
        joint = " à " if self.language == "fr" else ", "
        return f"{self.day(at.date())}{joint}{at:%H:%M} UTC"

    def data_of(self, data: Mapping[str, Any]) -> str:
        return self["data_of"].format(moment=self.moment(data["read_at"]))

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
        return self[name].format(moment=self.moment(moment)) if moment else ""

    def turnout(self, law: Mapping[str, Any]) -> str:
        if law["turnout_percent"] is None:
            return ""
        if law["total"] > law["eligible_voters"]:
            return self["over_turnout"].format(n=self.number(law["eligible_voters"]))
        return self["turnout"].format(percent=self.percent(law["turnout_percent"]))

    def row(self, law: Mapping[str, Any], chosen: str | None) -> str:
        """The row of one law, as the page's script makes it."""
        title = _shown_title(law)
        law_id = escape(law["law_id"])
        known = law["oui"] is not None
        numbers = {name: self.number(law[name]) if known else "–" for name in ("oui", "non", "total")}
        sizes = {name: ' class="long"' if len(text) > LONG_NUMBER else "" for name, text in numbers.items()}
        percents = {
            name: f" {self.percent(law[f'{name}_percent'])}" if known and law["total"] else ""
            for name in ("oui", "non")
        }
        ahead = {name: " ahead" if law["leader"] == name else "" for name in ("oui", "non")}
        share = law["oui_percent"] if known and law["total"] else None
        bar = (
            ""
            if share is None
            else (
                f'<rect class="for" width="{share}%" height="100%"/>'
                f'<rect class="against" x="{share}%" width="{law["non_percent"]}%" height="100%"/>'
                + (f'<rect class="gap" x="{share}%" width="4" height="100%"/>' if law["oui"] and law["non"] else "")
            )
        )
        label = self["shares"].format(oui=percents["oui"].strip(), non=percents["non"].strip())
        return (
            f'<tr role="row" class="{law["state"]}" id="law-{law_id}"><th role="rowheader" scope="row" class="law">'
            f'<bdi class="title">{escape(title or law["law_id"])}</bdi>'
            f'<a class="id" href="{escape(_query(law["law_id"], chosen, False))}">{law_id}</a></th>'
            f'<td role="cell" class="outcome">{escape(self.outcome(law))}</td>'
            f'<td role="cell" class="oui{ahead["oui"]}"><b{sizes["oui"]}>{numbers["oui"]}</b><span class="percent">{percents["oui"]}</span></td>'
            f'<td role="cell" class="share"><div class="around"><svg class="bar" role="img" aria-label="'
            f'{escape(label if share else self["no_votes"] if known else self["hidden"])}">{bar}</svg></div></td>'
            f'<td role="cell" class="non{ahead["non"]}"><b{sizes["non"]}>{numbers["non"]}</b><span class="percent">{percents["non"]}</span></td>'
            f'<td role="cell" class="total"><b{sizes["total"]}>{numbers["total"]}</b><span class="turnout">{escape(self.turnout(law))}</span></td>'
            f'<td role="cell" class="state"><span class="status">{escape(self[law["state"]])}</span>'
            f'<span class="when">{escape(self.when(law))}</span></td></tr>'
        )


def language_of(asked: str | None, accepted: str) -> str:
    """The language of the address (``lang``), or else that which the header Accept-Language ranks highest; or English."""
    if asked in LANGUAGES:
        return asked
    ranked = []
    for part in accepted.split(",")[:20]:
        if (found := _LANGUAGE.fullmatch(part)) and found[1]:
            try:
                ranked.append((float(found[2] or 1), found[1].lower()))
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
