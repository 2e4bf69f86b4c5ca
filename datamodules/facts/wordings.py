"""Sentences that state a fact and questions that ask for one, in parts, each part in one split.

`{e}` is the entity, `{a}` the attribute, `{v}` the value. A statement is an opening, a clause and
an ending; a question is a request and a lead, which ends right before the value, in a frame.
"""

from __future__ import annotations

import re
from itertools import product


def expand(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Every text that the patterns stand for; `[a|b]` is either, `[|b]` b or nothing."""
    texts: dict[str, None] = {}
    for pattern in patterns:
        choices = [part.split("|") for part in re.split(r"\[([^\]]*)\]", pattern)]
        # Every other part stood in brackets; what stands outside is one choice, bars and all.
        outside = re.split(r"\[[^\]]*\]", pattern)
        choices[::2] = [[text] for text in outside]
        texts.update(dict.fromkeys("".join(parts) for parts in product(*choices)))
    return tuple(texts)


# Clauses that state a fact. In those that put the value last a question may stop before it.
CLAUSES = {
    "train": expand(
        (
            # Families of clauses, by what comes first: the attribute, the entity, the value.
            "the {a} [of|for|belonging to|used by|meant for|in use for] {e} "
            "[is|was|reads|remains|became|has been] {v}",
            "the [right|new|old|current|only|real] {a} [of|for] {e} [is|was] {v}",
            "{e}'s [|new |old |own ]{a} [is|was|reads|remains|became] {v}",
            "the {a} that [belongs to|goes with|was made for|was found for] {e} [is|was|reads] {v}",
            "the {a} [which|that] {e} [has|uses|was given|keeps|goes by] is {v}",
            "{e} [has|uses|keeps|got|took|carries|received|shows|wants] {v} [as|for|as its|as "
            "the] {a}",
            "{e} [has|uses|keeps|got|took|carries|received|goes by|comes with] the {a} {v}",
            "{e} was given {v} [as|for|as its] {a}",
            "{e} has [a|one|its own] {a}[:|,| and it is|, namely] {v}",
            "{v} [is|was|became|remains] [the {a} of {e}|the {a} for {e}|{e}'s {a}|what {e} has "
            "as {a}]",
            "{v} [is used|was chosen|works|will do] as [the {a} of|a {a} for] {e}",
            "the {a} {v} [belongs to|is that of|was made for|was given to|is used by] {e}",
            "[we|they|someone|the office] [gave|lent|sent|sold] {e} the {a} {v}",
            "[we|they|someone|the office] [chose|set|noted|kept] {v} as the {a} [of|for] {e}",
            "[for|with|under|to] {e} [goes|belongs|comes] the {a} {v}",
            "[for|as for|in the case of] {e}, the {a} [is|was|was set to|has been] {v}",
            "[in the book|on the list|on the paper|in our files] [{e} has|we find for {e}] the "
            "{a} {v}",
            "[in the book|on the list|on the paper|in our files] the {a} of {e} is {v}",
            "[he|she|the clerk|a friend] [said|wrote|told me] that [the {a} of {e}|{e}'s {a}] "
            "[is|was] {v}",
            "[if you need|when asked for|to find] the {a} of {e}, [take|use|say|try] {v}",
            "[nobody|everybody|the boss] knows [the {a} of {e}|{e}'s {a}]: {v}",
            # Single ones.
            "the {a} of {e} is {v}",
            "the {a} for {e} is {v}",
            "{e}'s {a} is {v}",
            "{e} has the {a} {v}",
            "{e} has {v} as {a}",
            "{v} is the {a} of {e}",
            "{v} is {e}'s {a}",
            "{v} is what {e} has as {a}",
            "for {e}, the {a} is {v}",
            "for {e} the {a} was set to {v}",
            "as for {e}, its {a} is {v}",
            "{e} was given {v} as {a}",
            "{e} was given the {a} {v}",
            "{e} got {v} for a {a}",
            "we gave {e} the {a} {v}",
            "they gave {v} to {e} as {a}",
            "they chose {v} as the {a} of {e}",
            "someone chose the {a} {v} for {e}",
            "the {a} that belongs to {e} is {v}",
            "the {a} belonging to {e} reads {v}",
            "the {a} that {e} uses is {v}",
            "{e} uses {v} as {a}",
            "{e} uses the {a} {v}",
            "the {a} of {e} was changed to {v}",
            "the {a} of {e} turned out to be {v}",
            "the {a} of {e} has always been {v}",
            "{e} goes with the {a} {v}",
            "{e} comes with {v} as its {a}",
            "with {e} goes {v}, which is the {a}",
            "{v}: that is the {a} of {e}",
            "{e}: the {a} is {v}",
            "when asked for a {a}, {e} says {v}",
            "whoever needs the {a} of {e} should use {v}",
            "if you need the {a} for {e}, take {v}",
            "to {e} belongs the {a} {v}",
            "under {e} you find {v} as {a}",
            "the list shows {v} as the {a} of {e}",
            "our files show that the {a} for {e} is {v}",
            "everybody knows the {a} of {e}: {v}",
            "nobody but us knows that {e}'s {a} is {v}",
            "the {a}, in the case of {e}, is {v}",
            "it is {v} that is the {a} of {e}",
            "{e} has a {a}, and it is {v}",
            "there is a {a} for {e}, namely {v}",
            "there is only one {a} for {e}: {v}",
            "{e} carries {v} as {a}",
            "{e} keeps the {a} {v}",
            "{e} lists {v} under {a}",
            "the {a} written down for {e} is {v}",
            "written next to {e} was the {a} {v}",
            "{e} answered that the {a} was {v}",
            "he told me that the {a} of {e} is {v}",
            "she wrote that {e}'s {a} is {v}",
            "on the paper it says {v} for the {a} of {e}",
            "in the book {e} has {v} for a {a}",
            "the right {a} for {e} would be {v}",
            "the new {a} of {e}, {v}, works",
            "the {a} {v} belongs to {e}",
            "the {a} {v} is that of {e}",
            "the {a} {v} was made for {e}",
        )
    ),
    "validation": (
        "{e} is registered under the {a} {v}",
        "ever since spring {e} has relied on {v} for its {a}",
        "{v} serves {e} as {a}",
        "you can reach {e} by means of the {a} {v}",
        "the committee settled on {v} when a {a} for {e} was wanted",
        "regarding {e}: {a} equals {v}",
    ),
    "test": (
        "{e} can be identified by the {a} {v}",
        "{v} is recorded as the {a} that {e} holds",
        "{e} picked {v} to be its {a}",
        "engraved beside {e} stands {v}, its {a}",
        "it took years to find out that {e} had {v} for its {a}",
        "should the {a} of {e} ever be required, it will be {v}",
        "the {a} assigned to {e} happens to be {v}",
        "concerning {e}, one must remember the {a} {v}",
    ),
}
# Before a clause, which goes on as part of its sentence after a word or a comma.
OPENINGS = {
    "train": (
        "Remember that ",
        "Remember: ",
        "Note that ",
        "Note: ",
        "By the way, ",
        "As you know, ",
        "As agreed, ",
        "It is said that ",
        "It is known that ",
        "Please write down that ",
        "Do not tell anyone, but ",
        "And ",
        "But ",
        "Also, ",
        "Then again, ",
        "After a while it became clear that ",
        "Last year we heard that ",
        "Important: ",
        "In short, ",
        "So ",
        "I think that ",
        "I was told that ",
        "The letter says that ",
        "According to the register, ",
        "To be clear, ",
        "One more thing: ",
        "FYI: ",
        "PS: ",
        "* ",
        "- ",
        "1. ",
        "(a) ",
        "// ",
        "# ",
        "> ",
        "[note] ",
    ),
    "validation": ("Rumour has it that ", "Attention, please: ", "For the record, ", "~ "),
    "test": ("Incidentally, ", "Let it be known that ", "Reminder! ", "Curiously, ", ";; "),
}
# After a clause.
ENDINGS = {
    "train": (
        " Remember it.",
        " Do not forget it.",
        " Keep this to yourself.",
        " That is all.",
        " This will be needed later.",
        " It has not changed since.",
        " You may be asked for it.",
        " This is certain.",
        " No one objected.",
        " We checked it twice.",
    ),
    "validation": (" Store this safely.", " Nothing more was said."),
    "test": (" Commit that to memory.", " Everyone present nodded.", " Make no mistake about it."),
}
# Around a whole statement `{t}`.
WRAPPERS = {
    "train": (
        '"{t}"',
        "({t})",
        "**{t}**",
        "_{t}_",
        "/* {t} */",
        "<p>{t}</p>",
        "<!-- {t} -->",
        'Anna said: "{t}"',
        '"{t}" said Ben.',
        "{t} (from the minutes)",
        "Page 12: {t}",
        "Memo: {t}",
    ),
    "validation": ("<< {t} >>", "Bulletin [{t}]"),
    "test": ("<aside>{t}</aside>", "Broadcast begins. {t} Broadcast ends."),
}
# What asks for a fact.
REQUESTS = {
    "train": expand(
        (
            "[What|Which] [is|was] [the {a} of {e}|the {a} for {e}|{e}'s {a}]?",
            "[What|Which] {a} [does {e} have|does {e} use|has {e}|belongs to {e}|goes with "
            "{e}|was given to {e}|was chosen for {e}]?",
            "What does {e} [have|use|keep|need] [as|for] {a}?",
            "[Do you know|Do you remember|Have you seen|Did you note] [the {a} of {e}|{e}'s {a}]?",
            "[Can|Could|Will] you [tell me|give me|find|look up|repeat] [the {a} of {e}|{e}'s "
            "{a}]?",
            "[|Please ][tell me|give|state|name|repeat|find|write down|say] [the {a} of {e}|the "
            "{a} for {e}|{e}'s {a}].",
            "[I need|I want|I forgot|I am looking for|We need] [the {a} of {e}|{e}'s {a}].",
            "[About|On|As for] {e}: [what is the {a}|which {a} is it]?",
            "[In the text|Above|In what you read], what [is|was] [the {a} of {e}|{e}'s {a}]?",
            "What did [the text|it|they] say about [the {a} of {e}|{e}'s {a}]?",
            "What is the {a} of {e}?",
            "What is the {a} for {e}?",
            "What is {e}'s {a}?",
            "What's {e}'s {a}?",
            "What was the {a} of {e}?",
            "Which {a} does {e} have?",
            "Which {a} has {e}?",
            "Which {a} belongs to {e}?",
            "Which is the {a} of {e}?",
            "What {a} was given to {e}?",
            "What does {e} have as {a}?",
            "What does {e} use as {a}?",
            "What {a} does {e} use?",
            "Do you know the {a} of {e}?",
            "Do you remember {e}'s {a}?",
            "Can you tell me the {a} of {e}?",
            "Could you look up the {a} for {e}?",
            "Tell me the {a} of {e}.",
            "Tell me {e}'s {a}.",
            "Give the {a} of {e}.",
            "Give me the {a} for {e}.",
            "Name the {a} of {e}.",
            "Say what the {a} of {e} is.",
            "Find the {a} of {e} in the text.",
            "Find {e}'s {a} above.",
            "Look for {e}. What is the {a}?",
            "About {e}: what is the {a}?",
            "Of {e} we want to know the {a}.",
            "I need the {a} of {e}.",
            "I have forgotten {e}'s {a}.",
            "Please repeat the {a} of {e}.",
            "Please state {e}'s {a}.",
            "What did the text say about the {a} of {e}?",
            "What is said to be the {a} of {e}?",
            "If someone asks for {e}'s {a}, what do you say?",
            "The {a} of {e}?",
            "{e}'s {a}?",
            "{e}, {a}?",
            "{a} of {e}?",
            "Under which {a} is {e} found?",
        )
    ),
    "validation": (
        "Kindly quote the {a} that goes by {e}.",
        "How does {e}'s {a} read?",
        "What might {e}'s {a} be?",
        "From the passage, extract the {a} of {e}.",
        "Which entry would {e} have for {a}?",
    ),
    "test": (
        "Would you recall, for {e}, the {a}?",
        "Somebody wants {e}'s {a}; what is correct?",
        "Based on everything above, determine the {a} linked with {e}.",
        "Let us see whether you paid attention: {e} and its {a}?",
        "Supply the missing {a} for {e}.",
        "Quote {e}'s {a} exactly.",
    ),
}
# Between the request and the value.
LEADS = {
    "train": (
        "",
        "The text says",
        "I would say",
        "Here it is:",
        "->",
        *expand(
            (
                "[It|That|This] [is|was]",
                "[Sure, it|Well, it|As I remember, it|I think it|As far as I know, it] [is|was]",
                "[The|Its|Yes, the|Here the|Sure, the] {a} [is|was|reads|should be]",
                "[The {a} of {e}|The {a} for {e}|{e}'s {a}] [is|was|reads]",
                "{e} [has|had|uses|got|goes by|was given]",
                "[The answer|The value|The right one|The {a} in the text] is",
                "[Answer|The answer|Result|Value|Solution|Of course|Easy|Noted|{a}|{e}'s {a}]:",
                "[In the text it|Further up it|On one of the pages it] [is|says|reads]",
            )
        ),
    ),
    "validation": ("That would be", "The reply:", "Certainly, that was", "=>"),
    "test": ("The correct {a} must be", "Found:", "According to the above,", "Response:"),
}
# Around a request `{q}` and its lead, which is followed by the value.
FRAMES = {
    "train": (
        *("{q} {l}", "{q}\n{l}") * 80,  # a fifth of the questions stand alone
        *expand(
            (
                "[Question|Q|Query|Asked|1]: {q}[ |\n|\n\n][Answer|A|Answered|Told|2]: {l}",
                "[User|Human|Student|Teacher|Reader|Child|Visitor|Captain|Mary|Alice]: {q}[\n|\n\n]"
                "[Assistant|AI|Pupil|Librarian|Clerk|Robot|Doctor|Tom|Bob|Host]: {l}",
                "[Mary|The boss|A child] [asked|asks][:|,] {q} [Tom|The clerk|We] "
                "[answered|answers|said]: {l}",
                '"{q}" [he|she|someone|the boy] [asked|wanted to know|said].[ |\n]"{l}',
                '"{q}" - "{l}',
                "[-|*|1.|+] {q}\n[-|*|2.|+] {l}",
                "[#|##|###] [Question|Task|Problem]\n{q}\n[#|##|###] [Answer|Solution]\n{l}",
                "<question>{q}</question>\n<answer>{l}",
                "<q>{q}</q>[|\n]<a>{l}",
                "[Now|Here is|Next comes|Finally] a [question|riddle|request] "
                "[about the text|about what you read|on the pages above]. {q} {l}",
                "[Read|Look through|Search|Think of] the [text|pages|lines] above. {q} {l}",
                "[Answer|Say it|Write it|Reply] [in a few words|with the value alone|at once]. "
                "{q} {l}",
                "{q} [(see above)|(one answer)|(no guessing)][ |\n]{l}",
                "[Quiz|Test|Exam|Homework]: {q}\n[Solution|Result|Mine]: {l}",
            )
        ),
    ),
    "validation": (
        "Interviewer: {q}\nGuest: {l}",
        "Exercise 1. {q}\nKey: {l}",
        "After reading all of this, reply. {q} {l}",
    ),
    "test": (
        "Customer: {q}\nSupport: {l}",
        "Prompt> {q}\nOutput> {l}",
        "With the passage in mind, respond briefly. {q} {l}",
        "[INST] {q} [/INST] {l}",
    ),
}
