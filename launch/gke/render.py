"""Replace @NAME@ in a template with JSON values and print the result. Needs only Python's standard library.

    python3 launch/gke/render.py launch/gke/jobset.yaml NAME=text NAME:=json ... -- ARGS

NAME=text gives a string, NAME:=json any JSON value. The arguments after -- become the list @ARGS@, with `$` doubled, because
Kubernetes expands $(NAME) in arguments.
"""

import json
import re
import sys


def render(template: str, values: dict) -> str:
    """Return the template with each @NAME@ replaced with values[NAME]: as JSON, or verbatim if NAME ends in _KIND. Comments are unchanged.

    Raises:
      ValueError: a name has no value, or the template does not use a value.
    """
    lines, used = [], set()
    for line in template.splitlines():
        if not line.lstrip().startswith("#"):
            names = re.findall(r"@(\w+)@", line)
            if missing := [name for name in names if name not in values]:
                raise ValueError(f"the template needs a value for {missing[0]}")
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
