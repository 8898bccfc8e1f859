#!/usr/bin/env bash
# The wheel in a fresh environment, outside the checkout: score two experts, merge them with the stock
# mergekit-yaml, with nothing of ours imported by hand.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
bin=$work/venv/bin
"$bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps -w "$work/dist" "$root"
# Compiling every module takes a minute and a half; most are never imported here.
"$bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -c "$root/constraints.txt" "$work"/dist/*.whl
# What a user runs and nothing else: the package, its YAML, the start-up hook.
"$bin/python" - "$work"/dist/*.whl <<'PYTHON'
import sys, zipfile
names = zipfile.ZipFile(sys.argv[1]).namelist()
strange = [n for n in names if not n.startswith(("mergekit_wp/", "mergekit_wp.pth", "mergekit_wp.start", "mergekit_wp-"))]
strange += [n for n in names if "miniature" in n or n.startswith("mergekit_wp/shipped/") and not n.endswith(".yaml")]
assert not strange, strange
PYTHON
cd "$work"
cp "$root/tests/helpers/tiny.py" "$root/tests/helpers/wheel_models.py" .
export HF_HUB_OFFLINE=1
"$bin/python" wheel_models.py
for expert in one two; do
  "$bin/wp-score" --base base --expert $expert --pairs pairs.jsonl --out scores/$expert.safetensors --quiet
done
"$bin/mergekit-yaml" recipe.yaml merged --quiet
"$bin/wp-merge" recipe.yaml merged-by-wp-merge --quiet
"$bin/python" wheel_models.py compare
for command in wp-pairs wp-scores wp-anchor wp-answers wp-fit wp-aim wp-patch wp-eval wp-compare wp-push wp-study wp-run; do
  "$bin/$command" --help >/dev/null
done
# The paper's tasks travel with the package.
"$bin/python" -c "from mergekit_wp.eval.tasks import task_manager; task_manager(['wp_math', 'wp_gsm8k'], None)"
# Uninstalling takes the start-up hook along.
"$bin/python" -m pip uninstall --quiet --yes mergekit-wp
test -z "$(find "$work/venv" -iname '*mergekit_wp*' -print -quit)"
echo "wheel test passed"
