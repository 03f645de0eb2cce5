#!/bin/sh
# An authority of your own, and the certificates of a SuperLink: sh certificates.sh HOST [FOLDER]
# Needs openssl 3. Owners of data get ca.crt. Keep ca.key off the host: it makes further ones.
# server.pem and server.key, which the proxy shows to nodes, last a year, or the DAYS of the
# environment. To renew them run this again beside ca.key and ca.crt, and reload the proxy: no run
# stops. link.pem and link.key, which the SuperLink shows to this host alone, stay for ten years.
set -eu
umask 077
host=${1:?the name by which owners reach the host}
cd "${2:-.}"

key() {  # NAME WORD...: a new private key, and with it what the words ask for
  name=$1; shift
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout "$name.key" "$@"
}

signed() {  # NAME DAYS HOST NAMES: a certificate of the authority, whole or not at all
  key "$1.new" -subj "/CN=$3" -addext "subjectAltName=$4" -out "$1.csr"
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -days "$2" -copy_extensions copy \
    -out "$1.new.pem"
  chmod 644 "$1.new.pem"
  cat "$1.new.pem" > "$1.pem"
  cat "$1.new.key" > "$1.key"
  rm "$1.csr" "$1.new.pem" "$1.new.key"
}

here="DNS:localhost,IP:127.0.0.1"
if [ ! -e ca.key ]; then
  key ca -x509 -days 3650 -subj "/CN=house" -addext "keyUsage=critical,keyCertSign" -out ca.crt
fi
[ -e link.pem ] || signed link 3650 localhost "$here"
signed server "${DAYS:-365}" "$host" "DNS:$host,$here"
chmod 644 ca.crt server.pem link.pem
