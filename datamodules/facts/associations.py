"""Facts whose question shares no content word with its needle (after NoLiMa, arXiv 2502.05167).

Who is asked for has to be inferred: whoever lives next to the Eiffel Tower has been to Paris. That
takes knowledge of the world. A model trained from random weights learns the pairs of its own split
by heart; the pairs of the other splits ask for what it can only know from elsewhere.
"""

from __future__ import annotations

# `{e}` is the person; the question asks who it is.
ASSOCIATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        ("{e} lives next to the Eiffel Tower.", "Who has been to Paris?"),
        ("{e} rents a flat beside the Colosseum.", "Who has been to Rome?"),
        ("From the balcony {e} sees the Kremlin.", "Who has been to Moscow?"),
        ("{e} grew up around the corner from Big Ben.", "Who has been to London?"),
        ("{e} works in a kiosk by the Brandenburg Gate.", "Who has been to Berlin?"),
        ("{e} sells postcards below the Parthenon.", "Who has been to Athens?"),
        ("{e} was photographed before the Statue of Liberty.", "Who has been to New York?"),
        ("{e} guides strangers through the Alhambra.", "Who has been to Granada?"),
        ("{e} paddles along the Grand Canal each morning.", "Who has been to Venice?"),
        ("{e} sleeps in a tent near the Great Sphinx.", "Who has been to Egypt?"),
        ("{e} cannot digest milk.", "Who should avoid cheese?"),
        ("{e} has not touched meat for years.", "Who would refuse a steak?"),
        ("{e} sneezes whenever there is pollen about.", "Who suffers in a meadow of flowers?"),
        ("{e} becomes ill from a single peanut.", "Who must stay away from nuts?"),
        ("{e} tunes pianos for a living.", "Who needs a good ear for music?"),
        ("{e} stitches up patients all night.", "Who is a surgeon?"),
        ("{e} delivers letters from door to door.", "Who carries the mail?"),
        ("{e} puts out burning houses.", "Who is a firefighter?"),
        ("{e} steers a jet across the ocean.", "Who is a pilot?"),
        ("{e} bakes loaves before sunrise.", "Who makes bread?"),
        ("{e} speaks before the judge on behalf of clients.", "Who is a lawyer?"),
        ("{e} looks at galaxies through a telescope.", "Who is an astronomer?"),
        ("{e} milks forty cows.", "Who has a farm?"),
        ("{e} drills and fills teeth.", "Who is a dentist?"),
        ("{e} shoes horses at the anvil.", "Who is a blacksmith?"),
        ("{e} brings home trout and pike.", "Who went fishing?"),
        ("{e} dreads looking down from a roof.", "Who is afraid of heights?"),
        ("{e} never learnt to stay above water.", "Who is unable to swim?"),
        ("{e} wears a plaster cast on one leg.", "Who broke a bone?"),
        ("{e} blew out ninety candles on the cake.", "Who is very old?"),
    ),
    "validation": (
        ("{e} owns a cottage in view of Mount Fuji.", "Who has been to Japan?"),
        ("{e} repairs the bells of the Sagrada Familia.", "Who has been to Barcelona?"),
        ("{e} shivers whenever a spider appears.", "Who is scared of eight-legged creatures?"),
        ("{e} cuts and dries grapes in autumn.", "Who produces wine?"),
        ("{e} shelves novels and stamps return dates.", "Who is a librarian?"),
        ("{e} trims hedges and mows lawns.", "Who is a gardener?"),
    ),
    "test": (
        ("{e} lives opposite the Semper Opera House.", "Who has been to Dresden?"),
        ("{e} washes windows of the Taj Mahal.", "Who has been to India?"),
        ("{e} walks a dog around the Sydney Opera House.", "Who has been to Australia?"),
        ("{e} breaks out in hives after shrimp.", "Who has to skip the seafood platter?"),
        ("{e} falls sick from wheat and barley.", "Who eats only gluten-free food?"),
        ("{e} writes out prescriptions at the clinic.", "Who is a doctor?"),
        ("{e} mends leaking pipes.", "Who is a plumber?"),
        ("{e} keeps forty hives behind the barn.", "Who collects honey?"),
        ("{e} cannot tell red from green.", "Who is colour-blind?"),
        ("{e} needs a dog and a white cane.", "Who is unable to see?"),
    ),
}
LEADS = {
    "train": ("Answer:", "It is", "The answer is", "That is"),
    "validation": ("The reply:", "That would be"),
    "test": ("Response:", "Found:"),
}
# Words that carry no content; a needle and its question may share them.
FUNCTION_WORDS = """
    a about above after along all an and any are around at away be been before behind below beside
    by cannot down each eat for forty from had has have her his in into is it its make makes must
    near needs never new next not of on one only opposite or out over should single stay that the
    there through to unable up was who whenever with would
"""
