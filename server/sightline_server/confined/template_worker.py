"""One process that renders a chat template: reads chats from standard input, writes spans to standard output.

Started by ``template_renderer.py`` as ``python -m`` with one JSON argument. It is the place where a stranger's template
runs, so it limits its own memory and time, and ends with its parent.

Wire: a job is ``JOB`` followed by JSON. The first one is the template, with what it may name; every other one is a chat
and the time that the template may tell. An answer is ``ANSWER`` followed by JSON: spans, or the sentence of a refusal.
"""

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sightline_models.chat_template import ChatTemplate, ImagePart, Message, TextPart, TokenizerError
from sightline_server.confined.process import JOB, confine, limit_cpu, silence
from sightline_server.confined.template_wire import ANSWER, DONE, MAX_SENTENCE, REFUSED


def main() -> None:
    options = json.loads(sys.argv[1])
    confine(parent=options["parent"], memory_mb=options["memory_mb"])
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    silence()
    template = None
    while header := jobs.read(JOB.size):
        limit_cpu(options["cpu_s"])
        job = json.loads(jobs.read(JOB.unpack(header)[0]))
        status, answer = DONE, list[tuple[str, bool]]()
        try:
            if template is None:
                template = ChatTemplate(**job)
            else:
                answer = [(span.text, span.by_user) for span in _render(template, job)]
            body = json.dumps(answer)
        except TokenizerError as error:
            status, body = REFUSED, json.dumps(str(error)[:MAX_SENTENCE])
        answers.write(ANSWER.pack(status, len(body)))
        answers.write(body.encode())
        answers.flush()


def _render(template: ChatTemplate, job: Mapping[str, Any]) -> Any:
    messages = [
        Message(role, tuple(ImagePart() if text is None else TextPart(text) for text in texts))
        for role, texts in job["messages"]
    ]
    return template.render(messages, datetime.fromisoformat(job["now"]))


if __name__ == "__main__":
    main()
