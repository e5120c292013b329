#!/bin/sh
# A script that asks the kill switch before it does something, with curl (7.84 or newer) alone.
#
# Use: order_gate.sh SOCKET [--cancel]      exit code 0 sent, 3 blocked
set -u
socket=$1
intent=new
[ "${2-}" = --cancel ] && intent=cancel
said=

allowed() {
  # Cancels always pass: with the sidecar dead there is nobody to ask.
  [ "$intent" = cancel ] && return 0
  # curl ends with 0 only for a whole answer within --max-time; --disable ignores a .curlrc.
  said=$(curl --disable --silent --output /dev/null --max-time 0.5 --noproxy '*' --unix-socket "$socket" \
    --write-out '%{http_code} %header{x-killswitch-reason}' --header "X-Order-Intent: $intent" http://localhost/gate) || return 1
  case $said in
  '200 active' | '200 disabled' | '200 shadow') return 0 ;;
  *) return 1 ;;
  esac
}

if allowed; then
  echo "sent $intent"
else
  echo "blocked $said"
  exit 3
fi
