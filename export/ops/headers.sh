#!/usr/bin/env bash
# Where ONNX Runtime's C++ headers are: headers.sh FOLDER prints the folder of onnxruntime_cxx_api.h.
# A machine that lacks them gets them from Debian's package into FOLDER. That needs no root and leaves
# the machine's own apt as it is: the mirror is the one that the machine's sources name, and signatures
# are verified as ever.
set -euo pipefail

suite=trixie  # the oldest Debian that has the package
package=libonnxruntime-dev
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

for there in "${ONNXRUNTIME_INCLUDE:-}" /usr{/local,}/include/onnxruntime; do
  if [ -e "$there/onnxruntime_cxx_api.h" ]; then
    echo "$there"
    exit
  fi
done

folder=$(mkdir -p "$1" && cd "$1" && pwd)
headers=$folder/usr/include/onnxruntime

refuse() {
  echo "$1: install ONNX Runtime's C++ headers and name their folder in ONNXRUNTIME_INCLUDE" >&2
  exit 1
}

if [ ! -e "$headers/onnxruntime_cxx_api.h" ]; then
  for command in apt-get dpkg-deb; do
    command -v "$command" > /dev/null || refuse "No $command here"
  done
  [ -e "$keyring" ] || refuse "No keys of Debian's archive here"
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  mirror=$(apt-get update --print-uris \
    | sed -n "s|^'\(.*\)/dists/$codename/InRelease'.*|\1|p" | head -n 1)
  [ -n "$mirror" ] || refuse "apt's sources name no mirror of Debian $codename"

  apt=$folder/apt
  mkdir -p "$apt/lists/partial" "$apt/archives/partial"
  echo "deb [signed-by=$keyring] ${mirror%/} $suite main" > "$apt/sources.list"
  options=(
    -q -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
    -o Dir::State="$apt" -o Dir::State::Status=/dev/null -o Dir::Cache="$apt"
    -o APT::Update::Error-Mode=any -o APT::Sandbox::User= -o Acquire::Languages=none
  )
  {
    apt-get "${options[@]}" update && cd "$apt" && apt-get "${options[@]}" download "$package"
  } >&2 || refuse "apt could not get $package of Debian $suite"
  dpkg-deb --extract "$apt/$package"_*.deb "$folder"
  rm -rf "$apt"
fi
echo "$headers"
