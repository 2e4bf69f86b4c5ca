"""How tasks with several facts ask: for several values or entities, for owners, variables, words.

`{e}` is an entity, `{l}` a list of entities, `{a}` an attribute, `{p}` its plural, `{v}` a value,
`{x}` and `{y}` names of variables, `{t}` words of the text. Each form belongs to one split.
"""

from __future__ import annotations

Forms = dict[str, tuple[str, ...]]

# Each answer lists what is asked for after one of these.
LEADS: Forms = {
    "train": ("They are", "These are", "Answer:", "All of them:", "The list:", "In order:"),
    "validation": ("As follows:", "The reply:"),
    "test": ("Response:", "Found:"),
}
# An answer that is one name stands after one of these.
NAME_LEADS: Forms = {
    "train": ("It is", "That is", "Answer:", "The answer is", "I would say"),
    "validation": ("That would be", "The reply:"),
    "test": ("Response:", "Found:"),
}
VALUES: Forms = {
    "train": (
        "What are all the {p} of {e}?",
        "What are all {p} for {e}?",
        "Which {p} does {e} have?",
        "Which {p} were given to {e}?",
        "List every {a} of {e}.",
        "List all the {p} for {e}.",
        "Name all {p} of {e} in the order of the text.",
        "{e} has several {p}. Which ones?",
        "Tell me all of {e}'s {p}.",
        "Find all {p} of {e} in the text above.",
    ),
    "validation": ("Enumerate the {p} recorded under {e}.", "Say one after another {e}'s {p}."),
    "test": ("Mention each {a} that goes with {e}.", "Collect whatever {p} {e} possesses."),
}
ENTITIES: Forms = {
    "train": (
        "What are the {p} of {l}?",
        "What are the {p} for {l}?",
        "Which {p} have {l}?",
        "List the {p} of {l}.",
        "Give the {p} of {l}, in this order.",
        "Tell me the {p} for {l}.",
        "Look up {l}. What are their {p}?",
    ),
    "validation": ("One after another, quote the {p} of {l}.", "For {l}, how do the {p} read?"),
    "test": ("Supply, respectively, the {p} of {l}.", "Concerning {l}: report the {p}."),
}
# Which of several entities comes where in the text; the list is in another order.
ORDER: dict[str, Forms] = {
    "first": {
        "train": (
            "Of {l}, whose {a} is told first in the text?",
            "Which of {l} comes first above?",
            "In the text, who or what comes before the others: {l}?",
            "{l}: whose {a} do we learn first?",
        ),
        "validation": ("Name the earliest of {l}.", "With which of {l} did it start?"),
        "test": ("Among {l}, who leads the way?", "Determine which of {l} appears ahead."),
    },
    "last": {
        "train": (
            "Of {l}, whose {a} is told last in the text?",
            "Which of {l} comes last above?",
            "In the text, who or what comes behind the others: {l}?",
            "{l}: whose {a} do we learn last?",
        ),
        "validation": ("Name the final one of {l}.", "With which of {l} did it stop?"),
        "test": ("Among {l}, who brings up the rear?", "Determine which of {l} ends the row."),
    },
    "before": {
        "train": (
            "Of {l}, whose {a} is told right before that of {e}?",
            "Which of {l} comes next before {e}?",
            "Going back from {e}, which of {l} is the next?",
        ),
        "validation": ("Who precedes {e} among {l}?", "Up to {e}, which of {l} was the latest?"),
        "test": (
            "Ahead of {e}, which of {l} was mentioned most recently?",
            "{l}: {e} follows who?",
        ),
    },
    "behind": {
        "train": (
            "Of {l}, whose {a} is told right after that of {e}?",
            "Which of {l} comes next after {e}?",
            "Going on from {e}, which of {l} is the next?",
        ),
        "validation": ("Who succeeds {e} among {l}?", "From {e} on, which of {l} is nearest?"),
        "test": ("Past {e}, which of {l} gets mentioned soonest?", "{l}: who follows {e}?"),
    },
}
OWNERS: Forms = {
    "train": (
        "Whose {a} is {v}? It is that of",
        "Whose {a} is {v}? Answer:",
        "Who or what has the {a} {v}? That is",
        "Who has {v} as {a}? Answer:",
        "To whom does the {a} {v} belong? It belongs to",
        "The {a} {v} belongs to",
        "{v} is the {a} of",
        "Find what goes with the {a} {v}. Answer:",
        "Question: Which name has the {a} {v}?\nAnswer:",
    ),
    "validation": ("{v} counts as the {a} of", "Trace the {a} {v} back to its holder. The reply:"),
    "test": (
        "With whom would one associate the {a} {v}? Response:",
        "The bearer of the {a} {v} is",
    ),
}
# How a variable gets a value, and how another one gets that of the first.
ASSIGNMENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        ("{x} = {v}", "{x} = {y}"),
        ("{x} holds {v}.", "{x} holds what {y} holds."),
        ("let {x} = {v};", "let {x} = {y};"),
        ("set {x} to {v}", "set {x} to {y}"),
        ("{x} := {v}", "{x} := {y}"),
        ("{x} is {v}.", "{x} is the same as {y}."),
        ("The value of {x} is {v}.", "The value of {x} is that of {y}."),
        ("{x} gets {v}.", "{x} gets the value of {y}."),
        ("int {x} = {v};", "int {x} = {y};"),
        ("export {x}={v}", "export {x}=${y}"),
    ),
    "validation": (("{x} <- {v}", "{x} <- {y}"), ("Store {v} in {x}.", "Store {y} in {x}.")),
    "test": (
        ("assign {v} => {x}", "assign {y} => {x}"),
        ("{x} starts as {v}.", "{x} copies {y}."),
        ("VAR {x} = {v}", "VAR {x} = VAR {y}"),  # as RULER does
    ),
}
VARIABLES: Forms = {
    "train": (
        "Which variables have the value {v}?",
        "Which names stand for {v}?",
        "Find all variables that hold {v}.",
        "Find every variable whose value is {v} in the text above.",
        "List the variables that equal {v}.",
        "What is equal to {v}?",
        "Follow the chain from {v}. Which variables are on it?",
    ),
    "validation": ("Enumerate whatever evaluates to {v}.", "Trace {v}: where does it get to?"),
    "test": ("Determine which identifiers end up as {v}.", "Collect all that amounts to {v}."),
}
# What stands before a list of words, and what asks for those that come several times.
LISTS: Forms = {
    "train": ("Words:", "List:", "A list of words:", "Here are some words:", "Basket:", "Names:"),
    "validation": ("Vocabulary:", "Word heap:"),
    "test": ("Stock-taking:", "Assortment:"),
}
REPEATED: Forms = {
    "train": (
        "Which words occur more than once?",
        "Which words come several times in the list?",
        "What are the most common words?",
        "List the words that are repeated.",
        "Find the words that occur most often.",
        "Which words are there more than once?",
    ),
    "validation": ("Enumerate the frequent words.", "Which words turn up again and again?"),
    "test": ("Determine the recurring words.", "Collect what was written down repeatedly."),
}
# In a conversation, what asks how a sentence went on; elsewhere its words alone do.
RECALL: Forms = {
    "train": (
        "How does this go on: {t}",
        "What comes next? {t}",
        "Complete this as the text does: {t}",
        "Finish the sentence from the text: {t}",
        "Go on: {t} ...",
        "{t} ... What follows?",
        "What is written after this: {t}",
        "What stands behind these words in the text? {t}",
        "Here is how a sentence begins: {t}\nHow does it end?",
        "{t}",
    ),
    "validation": ("Pick up where this breaks off: {t}", "{t} - and then?"),
    "test": ("Carry on word for word from here: {t}", "Which ending did this have above? {t}"),
}
