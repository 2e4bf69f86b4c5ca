"""Forms of facts other than sentences: lines, JSON, tables, code, markup, logs, conversations.

Placeholders: `{e}` entity, `{v}` value, `{a}` attribute, `{A}` the same beginning with a capital,
`{s}` in snake_case, `{c}` in camelCase, `{S}` in CAPITALS, `{n}` a number, `{w}` a word. Each form
stands on lines of its own. A question is the part before the value, in a form that puts it last.
"""

from __future__ import annotations

STRUCTURES: dict[str, dict[str, tuple[str, ...]]] = {
    "line": {
        "train": (
            "{e}: {v}",
            "{e} = {v}",
            "{e} - {v}",
            "{e} -> {v}",
            "{e} {a}: {v}",
            "{e}, {a}: {v}",
            "{e} ({a}): {v}",
            "{e} / {a} / {v}",
            "{e} | {a} | {v}",
            "{e} . . . . . {v}",
            "{A} of {e}: {v}",
            "{A} ({e}): {v}",
            "{A} for {e} = {v}",
            "{A} [{e}] = {v}",
            "{a} {e} {v}",
            "{v} ({a} of {e})",
            "{v} - {a} - {e}",
            "Name: {e}, {A}: {v}",
            "Name: {e}\n{A}: {v}",
            "Subject: {e}\n{A}: {v}",
            "{e}\n    {a}: {v}",
            "{e}\n  * {a}: {v}",
            "{e} has {a}={v}",
        ),
        "validation": ("{e} >> {a} >> {v}", "Entry: {e}; {A}: {v}"),
        "test": ("{e} ~ {a} ~ {v}", "<< {e} >> {A} .. {v}", "Item: {e} // {A}: {v}"),
    },
    "json": {
        "train": (
            '{"name": "{e}", "{s}": "{v}"}',
            '{"id": {n}, "name": "{e}", "{s}": "{v}"}',
            '{"name": "{e}", "group": "{w}", "{c}": "{v}"}',
            '{"{e}": {"{a}": "{v}"}}',
            '{"{e}": {"group": "{w}", "{s}": "{v}"}}',
            '{"key": "{e}", "value": "{v}"}',
            '{"{s}": {"{e}": "{v}"}}',
            '{"{a} of {e}": "{v}"}',
            '{\n  "name": "{e}",\n  "{s}": "{v}"\n}',
            '["{e}", "{a}", "{v}"]',
        ),
        "validation": ('{"record": {"who": "{e}", "what": "{a}", "data": "{v}"}}',),
        "test": ('{"subject":"{e}","{c}":"{v}","seq":{n}}', '[{"{e}":[{"{a}":"{v}"}]}]'),
    },
    "yaml": {
        "train": (
            "{e}:\n  {s}: {v}",
            "{e}:\n  group: {w}\n  {s}: {v}",
            "- name: {e}\n  {s}: {v}",
            "{s}:\n  {e}: {v}",
        )
    },
    "ini": {"train": ("[{e}]\n{s} = {v}", "[{e}]\n{s}={v}", "[{e}]\nid = {n}\n{a} = {v}")},
    "table": {
        "train": (
            "| name | {a} |\n|---|---|\n| {e} | {v} |",
            "| {e} | {a} | {v} |",
            "| {e} | {v} |",
            "| {n} | {e} | {w} | {v} |",
            "name\t{a}\n{e}\t{v}",
            "{e}\t{v}",
            "{e}    {v}",
            "+ {e} + {v} +",
        )
    },
    "csv": {
        "train": (
            "name,{s}\n{e},{v}",
            "{n},{e},{v}",
            "{e};{v}",
            '"{e}","{v}"',
            '{n};"{e}";"{a}";"{v}"',
        )
    },
    "python": {
        "train": (
            '{s}["{e}"] = "{v}"',
            "{s}['{e}'] = '{v}'",
            '{s} = {"{e}": "{v}"}',
            'set_{s}("{e}", "{v}")',
            'records["{e}"]["{a}"] = "{v}"',
            'if name == "{e}":\n    {s} = "{v}"',
            'def {s}(name="{e}"):\n    return "{v}"',
            'assert {s}("{e}") == "{v}"',
            '# {a} of {e}\n{S} = "{v}"',
            'Record(name="{e}", {s}="{v}")',
            '>>> {s}("{e}")\n"{v}"',
        )
    },
    "javascript": {
        "train": (
            'const {c} = { "{e}": "{v}" };',
            '{c}.set("{e}", "{v}");',
            'case "{e}": return "{v}";',
            '{c}["{e}"] = "{v}";',
        )
    },
    "shell": {
        "train": (
            '$ get {s} "{e}"\n{v}',
            "$ lookup --name '{e}' --field {s}\n{v}",
            'export {S}="{v}"  # {e}',
        )
    },
    "xml": {
        "train": (
            '<entry name="{e}"><{s}>{v}</{s}></entry>',
            '<item name="{e}" {s}="{v}"/>',
            "<name>{e}</name><{s}>{v}</{s}>",
        )
    },
    "log": {
        "train": (
            "[{n}] INFO {w}: {a} of {e} set to {v}",
            "{n} {w} name={e} {s}={v}",
            "INFO {e}: {s}={v}",
            "[{w}] {e} {a} <- {v}",
        ),
        "test": ("<{n}> {w}[{e}]: updated {s} ==> {v}",),
    },
    "conversation": {
        "train": (
            "Anna: What is the {a} of {e}?\nBen: It is {v}.",
            "Anna: Do you know {e}'s {a}?\nBen: Yes, {v}.",
            "User: {e}'s {a} is {v}.\nAssistant: I will remember it.",
            "User: Please note the {a} of {e}: {v}.\nAssistant: Done.",
            '"And the {a} of {e}?"\n"{v}."',
            '"{e}?" - "Its {a} is {v}."',
            "Q: {a} of {e}?\nA: {v}",
            "A: I have the {a} of {e}.\nB: And?\nA: {v}.",
        ),
        "test": (
            "Sam> who has {e}'s {a}\nKit> me. it goes {v}.",
            "Clerk: Next, {e}. Your {a}, please.\nVisitor: {v}.",
        ),
    },
    "letter": {
        "train": (
            "Dear friend,\nthe {a} of {e} is {v}.\nYours, {w}",
            "To: {w}\nSubject: {a} of {e}\n\n{v}",
            "Re: {e}\nHere is the {a}: {v}",
        )
    },
    "toml": {"validation": ('[records."{e}"]\n{s} = "{v}"',)},
    "sql": {
        "validation": (
            "INSERT INTO {s} (name, value) VALUES ('{e}', '{v}');",
            "UPDATE list SET {s} = '{v}' WHERE name = '{e}';",
        )
    },
    "html": {
        "test": (
            "<tr><td>{e}</td><td>{a}</td><td>{v}</td></tr>",
            "<dl><dt>{e} ({a})</dt><dd>{v}</dd></dl>",
        )
    },
    "lisp": {"test": ('(set-{s} "{e}" "{v}")', "(({e} . {a}) . {v})")},
    "form": {"test": ("Full title ....... {e}\n{A} ....... {v}", "1) {e}\n2) {a}\n3) {v}")},
}
