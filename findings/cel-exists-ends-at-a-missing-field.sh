#!/usr/bin/env bash
# Expected: an expression in CEL has one value in each implementation. `list.exists(x, x.uri == "a")` is true if it is true of one
#   element, also where another one has no `uri`: the definition of the language lets the true one absorb the error.
# Actual: common-expression-language for Python absorbs errors of `||`, but not of `exists` and `all`: the first element without the
#   member ends it by KeyError, so it depends on the order of the list. `size` counts the bytes of a text and not its
#   characters; a number of JSON stays an integer, so that `count + 1.0` fails, where cel-go fails at `count * 2`. cel-go
#   refuses an unknown variable when it compiles; the Python library finds it when it is reached.
# Versions: common-expression-language 0.10.0 (PyPI), cel.dev/cel-go v0.33.2 (Go module), Go 1.26 or newer.
# Why a registry cache must care: lists of an attestation, such as the materials of a build, have elements of several kinds. A
#   condition that is true by cel-go refuses valid images here, or works until the order changes. Write
#   `exists(x, has(x.uri) && x.uri == "a")`, which both take, and check the names of variables at the start.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -p=1" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip -q install --disable-pip-version-check common-expression-language==0.10.0
cat > predicate.json <<'JSON'
{"materials": [{"name": "tool"}, {"uri": "a"}], "word": "caf\u00e9", "count": 3}
JSON
cat > expressions.json <<'JSON'
["predicate.count == 3 || predicate.gone == 1", "predicate.gone == 1 || predicate.count == 3",
 "predicate.materials.exists(m, m.uri == 'a')", "predicate.materials.exists(m, has(m.uri) && m.uri == 'a')",
 "predicate.materials.all(m, m.uri == 'b')", "size(predicate.word) == 4", "predicate.count + 1.0 == 4.0",
 "predicate.count * 2 == 6", "predicate.count == 3 || predicat.count == 3"]
JSON
cat > main.go <<'GO'
package main

import (
	"encoding/json"
	"os"

	"cel.dev/cel-go/cel"
)

func read(file string, to any) {
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, to)
	}
	if err != nil {
		panic(err)
	}
}

func value(environment *cel.Env, expression string, predicate any) any {
	ast, issues := environment.Compile(expression)
	if issues.Err() != nil {
		return "not compiled"
	}
	program, err := environment.Program(ast)
	if err != nil {
		return "not compiled"
	}
	out, _, err := program.Eval(map[string]any{"predicate": predicate})
	if err != nil {
		return "error"
	}
	return out.Value()
}

func main() {
	var predicate any
	var expressions []string
	read("predicate.json", &predicate)
	read("expressions.json", &expressions)
	environment, err := cel.NewEnv(cel.Variable("predicate", cel.DynType))
	if err != nil {
		panic(err)
	}
	values := []any{}
	for _, expression := range expressions {
		values = append(values, value(environment, expression, predicate))
	}
	if err := json.NewEncoder(os.Stdout).Encode(values); err != nil {
		panic(err)
	}
}
GO
go mod init example.com/finding 2> /dev/null
go get cel.dev/cel-go/cel@v0.33.2 2> /dev/null
go build -o cel-go .
./cel-go > go.json
venv/bin/python - <<'PYTHON'
import importlib.metadata
import json
import sys
from pathlib import Path

import cel


def value(expression: str, predicate: object) -> object:
    try:
        program = cel.compile(expression)
    except ValueError:
        return "not compiled"
    try:
        return program.execute({"predicate": predicate})
    except Exception as error:
        return type(error).__name__


expressions = json.loads(Path("expressions.json").read_text())
predicate = json.loads(Path("predicate.json").read_text())
by_go = json.loads(Path("go.json").read_text())
by_python = [value(each, predicate) for each in expressions]
print(f"common-expression-language {importlib.metadata.version('common-expression-language')}, cel-go 0.33.2")
for expression, python, go in zip(expressions, by_python, by_go, strict=True):
    print(f"{expression}\n  Python: {python}, Go: {go}")
holds = by_python == [True, True, "KeyError", True, "KeyError", False, "TypeError", True, True] and by_go == [
    True,
    True,
    True,
    True,
    False,
    True,
    True,
    "error",
    "not compiled",
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
