"""`scalellm chat`: a conversation in the terminal."""

import argparse
import importlib.util
import sys
from typing import Any

from scalellm.cli.answer import add_sampling, endpoint_of, request_fields, show
from scalellm.cli.endpoint import Endpoint
from scalellm.cli.flags import add_settings, resolve_arguments
from scalellm.errors import EndpointError

_HELP = """/reset   forget the conversation
/history show it
/help    this list
/exit    leave (as does Ctrl-D); Ctrl-C stops an answer
"""
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "chat")
    add_sampling(parser)
    parser.add_argument("--system", help="system message of the conversation")


def run(arguments: argparse.Namespace) -> int:
    endpoint = endpoint_of(resolve_arguments(arguments))
    chat = Chat(endpoint, request_fields(arguments, endpoint), arguments.system)
    if sys.stdin.isatty() and importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # gives input() its line editing and history
    return chat.run()


class Chat:
    """One conversation: messages so far and the fields every request has."""

    def __init__(self, endpoint: Endpoint, fields: dict[str, Any], system: str | None) -> None:
        self._endpoint = endpoint
        self._fields = fields
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._start)
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> int:
        """Read lines until the end of input; 1 when an answer failed and nobody sits there."""
        if self._terminal:
            print(f"{self._fields['model']} at {self._endpoint.url}; /help for commands")
        while True:
            try:
                line = input("> " if self._terminal else "").strip()
            except EOFError:
                if self._terminal:
                    print()
                return 0
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                print("\n(/exit or Ctrl-D to leave)")
                continue
            if line in ("/exit", "/quit"):
                return 0
            if line.startswith("/"):
                self._command(line)
            elif line and not self._answer(line) and not self._terminal:
                return 1

    def _command(self, line: str) -> None:
        if line == "/reset":
            self._messages = list(self._start)
            print("(forgotten)")
        elif line == "/history":
            for message in self._messages:
                print(f"{message['role']}: {message['content']}")
        else:
            print(_HELP if line == "/help" else f"no command {line}\n{_HELP}", end="")

    def _answer(self, line: str) -> bool:
        """One turn; a turn that failed leaves no trace in the conversation."""
        asked = [*self._messages, {"role": "user", "content": line}]
        try:
            body = {**self._fields, "messages": asked}
            answer = show(self._endpoint.stream("/v1/chat/completions", body))
        except EndpointError as error:
            print(f"scalellm chat: {error}", file=sys.stderr)
            return False
        print()
        if self._terminal:
            stopped = "stopped; " if answer.interrupted else ""
            print(f"{_DIM}({stopped}{answer.speed()}){_PLAIN}")
        self._messages = [*asked, {"role": "assistant", "content": answer.text}]
        return True
