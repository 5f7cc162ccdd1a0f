"""Replaces @NAME@ in a template by JSON values; prints the result. Needs nothing but Python.

    python3 launch/gke/render.py launch/gke/jobset.yaml NAME=text NAME:=json ... -- ARGS

NAME=text stands for a string, NAME:=json for any JSON value. What follows -- becomes the list @ARGS@, in which `$` is
doubled, as Kubernetes replaces $(NAME) in arguments.
"""

import json
import re
import sys


def render(template: str, values: dict) -> str:
    """The template with each @NAME@ replaced by values[NAME] as JSON, or as it is if NAME ends in _KIND. Comments are kept.

    Raises:
      ValueError: a name without a value, or a value that the template does not use.
    """
    lines, used = [], set()
    for line in template.splitlines():
        if not line.lstrip().startswith("#"):
            names = re.findall(r"@(\w+)@", line)
            if missing := [name for name in names if name not in values]:
                raise ValueError(f"the template needs {missing[0]}")
            used.update(names)
            line = re.sub(r"@(\w+)@", lambda m: values[m[1]] if m[1].endswith("_KIND") else json.dumps(values[m[1]]), line)
        lines.append(line)
    if unused := values.keys() - used:
        raise ValueError(f"the template does not use {', '.join(sorted(unused))}")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    end = argv.index("--")
    values = {"ARGS": [argument.replace("$", "$$") for argument in argv[end + 1 :]]}
    for pair in argv[1:end]:
        key, _, text = pair.partition("=")
        values[key.removesuffix(":")] = json.loads(text) if key.endswith(":") else text
    try:
        with open(argv[0], encoding="utf-8") as file:
            sys.stdout.write(render(file.read(), values))
    except (ValueError, OSError) as error:
        print(f"render.py: {argv[0]}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
