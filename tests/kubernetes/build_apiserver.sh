#!/bin/bash
# Builds kube-apiserver from Debian's source package, for tests/kubernetes, and unpacks Debian's etcd beside it.
#
#   build_apiserver.sh FOLDER
#
# It needs Debian 12 or an image of it, apt's own package sources, 3 GB of disk while it runs, and 10 to 15 minutes of two
# cores. It installs nothing, changes no setting of apt and needs no root: packages are unpacked below build/.
set -euo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$PWD/build/kubernetes
[ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" = bookworm ] || {
  echo 'This needs Debian 12 (bookworm), whose source package of kubernetes it builds.' >&2
  exit 1
}
rm -rf "$work"
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
mkdir -p "$work"/apt/{lists,archives}/partial "$work"/{debs,root,go/src/k8s.io/kubernetes}

# The machine's package sources, asked for sources as well.
sources=$work/apt/parts
mkdir "$sources"
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources}; do
  [ -f "$file" ] || continue
  case $file in
    *.list) sed -n 's/^deb \(.*\)/deb \1\ndeb-src \1/p' "$file" > "$sources/${file##*/}" ;;
    *) sed 's/^Types:.*/Types: deb deb-src/' "$file" > "$sources/${file##*/}" ;;
  esac
done
apt() {
  apt-get --quiet --quiet -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$sources" \
    -o Dir::State::Lists="$work/apt/lists" -o Dir::Cache::Archives="$work/apt/archives" \
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User="$(id -un)" "$@"
}

echo 'kube-apiserver: downloading its source, Go and etcd, 125 MB'
apt update
cd "$work/debs"
apt download golang-1.19-go golang-1.19-src golang-github-modern-go-reflect2-dev etcd-server
apt --download-only source kubernetes
for package in *.deb; do dpkg -x "$package" "$work/root"; done
kubernetes=$work/go/src/k8s.io/kubernetes
tar -xf kubernetes_*.orig.tar.gz -C "$kubernetes" --strip-components 1
cp "$work/root/usr/bin/etcd" "$out/etcd"

export GOROOT=$work/root/usr/lib/go-1.19 GOPATH=$work/go GOCACHE=$work/cache GO111MODULE=off GOFLAGS= CGO_ENABLED=0
go=$GOROOT/bin/go
cd "$kubernetes"
# The vendored reflect2 crashes when it is compiled with a Go of this age.
rm -rf vendor/github.com/modern-go/reflect2
cp -r "$work/root/usr/share/gocode/src/github.com/modern-go/reflect2" vendor/github.com/modern-go/reflect2

# The one generated file that neither upstream nor Debian ships.
echo 'kube-apiserver: generating OpenAPI definitions'
"$go" build -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
packages=$(grep -rlE --include='*.go' '^ *// *\+k8s:openapi-gen=' pkg staging/src/k8s.io |
  grep -vE '/(code-generator|sample-apiserver)/|_test\.go$' | xargs -n1 dirname | LC_ALL=C sort -u |
  sed -e 's#^staging/src/##' -e 's#^pkg/#k8s.io/kubernetes/pkg/#' | paste -sd,)
PATH=$GOROOT/bin:$PATH "$work/openapi-gen" --go-header-file hack/boilerplate/boilerplate.generatego.txt \
  --output-file-base zz_generated.openapi --output-base "$GOPATH/src" --output-package k8s.io/kubernetes/pkg/generated/openapi \
  --report-filename "$work/violations" --input-dirs "$packages"

echo 'kube-apiserver: compiling, 10 to 15 minutes'
version=k8s.io/kubernetes/vendor/k8s.io/component-base/version
"$go" build -ldflags "-s -w -X $version.gitVersion=v1.20.2 -X $version.gitMajor=1 -X $version.gitMinor=20" \
  -o "$out/kube-apiserver" ./cmd/kube-apiserver
"$out/kube-apiserver" --version
