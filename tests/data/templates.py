"""Small chat templates, each with a habit of a real family."""

TURN = "{{ '<|' + m['role'] + '|>' }}"
ASK = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
TOOLS = "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"


def template(body, head=""):
    return f"{head}{{% for m in messages %}}{body}{{% endfor %}}{ASK}"


# Says everything that it is given; a turn ends with the end of text.
PLAIN = template(TURN + "{{ m['content'] + eos_token }}")
# Neither a system message nor two turns of one side.
STRICT = template(
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{{ m['content'] + eos_token }}"
)
# Tools, calls and their results.
CALLING = template(
    TURN + "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ '<call>' + c['function']['name'] + ' ' }}{{ c['function']['arguments'] | tojson }}{% endfor %}"
    "{{ eos_token }}",
    TOOLS,
)
# A call is written in the place of the text beside it; more than one is refused.
CALL_ALONE = template(
    TURN + "{% if m['tool_calls'] %}"
    "{% if m['tool_calls'] | length > 1 %}{{ raise_exception('single tool-calls only') }}{% endif %}"
    "{{ m['tool_calls'][0]['function'] | tojson }}{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}",
    TOOLS,
)
# Adds the arguments of a call as text to text.
CALL_TEXT = template(
    TURN + "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ '<call>' + c['function']['name'] + ' ' + c['function']['arguments'] }}{% endfor %}{{ eos_token }}",
    TOOLS,
)
# Puts the arguments of a call out as they are: an object would come out as Python writes it.
CALL_AS_IS = CALL_TEXT.replace(" + c['function']['arguments']", " }}{{ c['function']['arguments']")
# Only the first call.
FIRST_CALL = CALLING.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:1]")
# Tools and calls, but passes over their results.
NO_RESULTS = CALLING.replace(TURN, "{% if m['role'] == 'tool' %}{% continue %}{% endif %}" + TURN)
# Reasoning of the last turn alone.
THINKING = template(
    TURN + "{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<think>' + (m['reasoning_content'] or '') + '</think>' }}{% endif %}{{ m['content'] + eos_token }}"
)
# Cuts reasoning out of the answer.
THOUGHTLESS = template(TURN + "{{ m['content'].split('</think>')[-1] + eos_token }}")
# Ends the whole with a token of its own.
ENDED = PLAIN.replace(ASK, ASK.replace("{% endif %}", "{% else %}{{ '<end>' }}{% endif %}"))
# Reads parts, and passes over texts.
PARTS = template(TURN + "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{{ eos_token }}")
# An earlier turn depends on what follows it: thoughts before a call are dropped once the answer is known.
LOOKING_AHEAD = template(
    TURN + "{% if m['tool_calls'] %}"
    "{% if messages[-1]['role'] != 'assistant' or messages[-1]['tool_calls'] %}{{ m['content'] }}{% endif %}"
    "{{ m['tool_calls'][0]['function'] | tojson }}{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}",
    TOOLS,
)
# Leaves a system message out.
NO_SYSTEM = PLAIN.replace(TURN, "{% if m['role'] == 'system' %}{% continue %}{% endif %}" + TURN)
