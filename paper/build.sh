#!/bin/sh
# paper/build/main.pdf from main.tex, figures/ and tables/. The same input gives the same bytes.
# Exit code: 0 with a PDF, 3 where there is no TeX to make it with, else what TeX ended with.
set -eu
cd "$(dirname "$0")"
mkdir -p build
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-1764547200}" FORCE_SOURCE_DATE=1 TZ=UTC
packages="latexmk texlive-latex-recommended texlive-fonts-recommended texlive-latex-extra texlive-science"

if ! command -v latexmk >/dev/null && [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ]; then
  echo "paper: installing TeX ($packages)"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages >/dev/null; } || echo 'paper: TeX could not be installed' >&2
fi

if command -v latexmk >/dev/null; then
  latexmk -pdf -interaction=nonstopmode -halt-on-error -file-line-error -silent -outdir=build main.tex >build/latexmk.txt 2>&1 ||
    { cat build/latexmk.txt; grep -A3 -E '^[^ ]+:[0-9]+:' build/main.log; exit 1; }
elif command -v tectonic >/dev/null; then
  tectonic --outdir build main.tex
else
  echo "paper: figures/ and tables/ are made, the PDF is NOT: neither latexmk nor tectonic is here. On Debian: apt install $packages" >&2
  exit 3
fi
echo "paper: paper/build/main.pdf"
