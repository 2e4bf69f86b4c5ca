"""What of an entity is told: its pass key, its birthday, its owner and so on.

An attribute has several wordings, so that a question may use another one than the statement.
Whole attributes are held out: no wording of a held-out one is a wording of training.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ic.datamodules.facts.splits import check_split, pick
from ic.datamodules.needle_names import SPLITS


class Attribute(NamedTuple):
    """Ways to call one attribute; the first is the plainest."""

    wordings: tuple[str, ...]


# A line for each attribute, its wordings between commas.
_LINES = {
    "train": """
        pass key, key, passkey
        access code, entry code, code for getting in
        password, secret word, pass phrase
        PIN, PIN code, personal number
        serial number, number on the label, stamped number
        combination, lock combination, combination of the lock
        identifier, ID, identification
        token, login token, session token
        reference, reference mark, file reference
        magic number, lucky number, charmed number
        code name, cover name, alias
        nickname, pet name, byname
        ticket, ticket number, number on the ticket
        account, account number, bank account
        address, place to write to, mailing address
        phone number, telephone number, number to call
        call sign, radio name, radio call
        birthday, date of birth, day of birth
        deadline, due date, last day
        arrival, arrival time, time of arrival
        price, cost, amount to pay
        weight, measured weight, mass
        height, measured height, size
        colour, shade, tint
        owner, holder, possessor
        teacher, tutor, instructor
        partner, companion, mate
        home town, town of origin, place of origin
        destination, goal, end of the journey
        motto, watchword, slogan
        title, heading, name on the cover
        label, tag, sticker
        licence, licence number, permit
        version, release, edition
        result, outcome, final score
        favourite word, word of choice, preferred word
        answer, reply, response
        symbol, sign, emblem
        signal, agreed signal, secret sign
        location, whereabouts, position
        contact, contact person, person to ask
        successor, heir, next in line
        recipe, mixture, formula
        rank, grade, standing
        score, mark, points
        value, setting, content
        record, best mark, personal best
        seal, stamp, imprint
        channel, frequency, station
        route, way, path
    """,
    "validation": """
        registration, enrolment number
        verification phrase, confirmation phrase
        hiding spot, cache
        maiden name, family name at birth
        departure, leaving time
        batch, lot
        patron, sponsor
    """,
    "test": """
        activation string, unlocking string
        clearance, security grant
        customs tariff, import duty
        voucher, coupon
        safe word, stop word
        wedding day, marriage anniversary
        invoice, bill
        favourite dish, preferred meal
        supervisor, boss
    """,
}


def _read(lines: str) -> tuple[Attribute, ...]:
    stripped = [line.strip() for line in lines.strip().splitlines()]
    return tuple(Attribute(tuple(line.split(", "))) for line in stripped)


ATTRIBUTES: dict[str, tuple[Attribute, ...]] = {split: _read(_LINES[split]) for split in SPLITS}


def draw_attribute(rng: np.random.Generator, split: str) -> Attribute:
    """One of the split's attributes."""
    check_split(split)
    return pick(rng, ATTRIBUTES[split])


def plural(attribute: str) -> str:
    """The attribute as several are called, by its last word: `pass keys`, `batches`, `days`."""
    if attribute.endswith(("s", "x", "ch", "sh")):
        return f"{attribute}es"
    if attribute.endswith("y") and attribute[-2] not in "aeiou":
        return f"{attribute[:-1]}ies"
    return f"{attribute}s"
