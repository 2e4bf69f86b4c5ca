"""let an aligned model write conversations by itself (data=sft)"""

from __future__ import annotations

from ic.inference.chats.options import MakeChatsOptions as Config


def check(config: Config) -> None:
    """Refuse what can be refused before PyTorch is loaded: no source, other settings' output."""
    from ic.inference.chats.record import ChatRecord
    from ic.inference.generate.options import check_utf8

    check_utf8("system", config.system or "")
    ChatRecord(config)


def run(config: Config) -> int:
    """Write the conversations."""
    from ic.inference.chats.make import make_chats

    return make_chats(config)
