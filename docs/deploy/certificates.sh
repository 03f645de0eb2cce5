#!/bin/sh
# An authority of your own, and the certificate of a SuperLink: sh certificates.sh HOST [FOLDER]
# Needs openssl 3. Owners of data get ca.crt. Keep ca.key off the host: it makes further ones.
# The certificate lasts a year: run this again beside ca.key and ca.crt, which last ten.
set -eu
umask 077
host=${1:?the name by which owners reach the host}
cd "${2:-.}"
new="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
# shellcheck disable=SC2086  # several words
if [ ! -e ca.key ]; then
  openssl req -x509 $new -days 3650 -subj "/CN=house" -addext "keyUsage=critical,keyCertSign" \
    -keyout ca.key -out ca.crt
fi
# shellcheck disable=SC2086
openssl req $new -subj "/CN=$host" -keyout server.key -out server.csr \
  -addext "subjectAltName=DNS:$host,DNS:localhost,IP:127.0.0.1"
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -days 365 -copy_extensions copy \
  -out server.pem
rm server.csr
chmod 644 ca.crt server.pem
