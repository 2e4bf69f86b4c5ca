"""Words and names that facts are made of, each in one split.

`assets/words.json` holds 8,000 lower-case English words, the most frequent ones but 300 of 150
public-domain books. That is too many to be learned by heart as answers.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from ic.datamodules.facts.splits import draw_of_split, pick, split_of
from ic.datamodules.needle_names import SPLITS

_WORDS = Path(__file__).parents[1] / "assets" / "words.json"
_FIRST_NAMES = """
    Aaron Abigail Ada Adele Agnes Ahmed Aisha Alan Albert Alejandro Alice Alma Amara Amelia Amir Ana
    Andre Anita Anton Arjun Arthur Astrid Aurora Barbara Beatrice Benjamin Bernard Bianca Boris
    Bruno Camila Carla Carlos Caroline Cecilia Chen Chloe Christine Clara Claude Conrad Dalia Damian
    Daniel Daria David Deborah Denis Diana Diego Dmitri Dorothy Edgar Edith Edward Elena Elias Elisa
    Emil Emma Enzo Eric Esther Eva Fatima Felix Fiona Florence Frank Freya Gabriel George Gerda
    Gideon Gloria Grace Greta Gustav Hannah Harold Hassan Hector Heidi Helen Henry Hugo Ibrahim Ida
    Igor Ines Ingrid Irene Isaac Isabel Ivan Jacob James Jana Jasmine Javier Joan Johanna Jonas
    Joseph Julia Julian Kamal Karen Karl Kenji Klara Lars Laura Lena Leo Leon Lillian Linda Louis
    Lucia Lukas Lydia Magnus Malik Marco Margaret Maria Marie Martin Mateo Matilda Maya Mehmet Mia
    Michael Miguel Milan Mira Mohamed Monica Nadia Naomi Nathan Nicolas Nina Noah Nora Olga Oliver
    Omar Oscar Otto Pablo Paul Pedro Peter Petra Philip Priya Rachel Rafael Rania Ravi Rebecca Rita
    Robert Rosa Ruth Samir Samuel Sara Sebastian Sergei Silvia Simon Sofia Stefan Stella Susan Sven
    Tamara Tariq Teresa Theo Thomas Tobias Ursula Valentina Vera Victor Viktoria Walter Wanda Wei
    William Xavier Yara Yasmin Yusuf Yuki Zara Zoe
"""
_LAST_NAMES = """
    Abbott Adler Ahmad Alvarez Anders Archer Bailey Baker Barnes Bauer Becker Bennett Berg Bianchi
    Blake Bond Brandt Brennan Brooks Burke Campbell Carter Castillo Chandra Chapman Clarke Cohen
    Costa Cruz Dahl Dalton Diaz Dixon Dubois Duncan Eklund Ellis Evans Farrell Fischer Fleming Ford
    Foster Fuchs Garcia Gibson Gomez Graham Grant Greene Gupta Haas Halvorsen Hansen Harper Hayes
    Herrera Hoffman Holm Hughes Hussain Ibsen Ito Ivanov Jansen Jensen Kaplan Kaur Keller Kelly Khan
    Kim Klein Koch Kovacs Kowalski Kumar Lang Larsen Lehmann Lindgren Lopez Lund Maier Marino
    Marsh Mason Medina Mendez Meyer Mills Molina Moreau Morgan Moreno Murphy Nagy Nakamura Nash
    Navarro Nguyen Nielsen Novak Obrien Okafor Olsen Ortega Owens Palmer Park Patel Pearce Petrov
    Pratt Quinn Ramos Reed Reyes Ricci Richter Rivera Romano Rossi Russo Sanders Santos Sato
    Schmidt Schneider Sharma Shaw Silva Singh Soto Stein Stone Suzuki Svensson Tanaka Thorne Torres
    Turner Unger Vance Vargas Vega Vogel Wagner Walsh Weber Weiss Winter Wolf Wong Yamada Young
    Zhang Zimmer
"""
_ONSETS = """
    b bl br c ch cl cr d dr f fl fr g gl gr h j k kr l m n p pl pr r s sh sl st str t th tr v w z
"""
_VOWELS = "a e i o u a e i o u ai au ea ee ie oo ou"
_CODAS = " - - - b ck d g k l ll lm m n nd ng nt p r rk rn rt s sk ss st t th x z"
_TOWN_ENDINGS = """
    bridge burg bury dale field ford ham haven ley mouth port stead ton ville wick wood
"""


def _by_split(words: list[str]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(word for word in words if split_of(word) == name) for name in SPLITS}


FIRST_NAMES = _by_split(_FIRST_NAMES.split())
LAST_NAMES = _by_split(_LAST_NAMES.split())


@cache
def english_words() -> dict[str, tuple[str, ...]]:
    """The words of each split, in alphabetical order."""
    return _by_split(json.loads(_WORDS.read_text(encoding="utf-8")))


def draw_word(rng: np.random.Generator, split: str) -> str:
    """An English word in lower case."""
    return pick(rng, english_words()[split])


def _syllable(rng: np.random.Generator) -> str:
    return pick(rng, _ONSETS.split()) + pick(rng, _VOWELS.split())


def _coda(rng: np.random.Generator) -> str:
    return pick(rng, _CODAS.split()).removeprefix("-")


def draw_pseudo_word(rng: np.random.Generator, split: str) -> str:
    """A word that can be pronounced and means nothing, of two or three syllables."""

    def make(rng: np.random.Generator) -> str:
        syllables = [_syllable(rng) for _ in range(int(rng.integers(2, 4)))]
        return "".join(syllables) + _coda(rng)

    return draw_of_split(rng, split, make)


def draw_first_name(rng: np.random.Generator, split: str) -> str:
    return pick(rng, FIRST_NAMES[split])


def draw_last_name(rng: np.random.Generator, split: str) -> str:
    """A common surname or, as often, one that nobody bears."""
    if rng.random() < 0.5:
        return pick(rng, LAST_NAMES[split])
    return draw_pseudo_word(rng, split).capitalize()


def draw_full_name(rng: np.random.Generator, split: str) -> str:
    return f"{draw_first_name(rng, split)} {draw_last_name(rng, split)}"


def draw_town(rng: np.random.Generator, split: str) -> str:
    """A town that is on no map, such as Bralford."""

    def make(rng: np.random.Generator) -> str:
        return f"{_syllable(rng)}{_coda(rng)}{pick(rng, _TOWN_ENDINGS.split())}".capitalize()

    return draw_of_split(rng, split, make)
