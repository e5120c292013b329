#!/bin/sh
# The same with the killswitch command, where it is installed: it knows quantities and says why.
#
# Use: order_check.sh SOCKET [--cancel]      exit code 0 sent, 3 blocked
set -u

# `check` ends with 0 for allowed, 3 for denied and 1 when nobody answers: only 0 allows. It lets cancels pass by itself.
if [ "${2-}" = --cancel ]; then
  killswitch check --gate-socket "$1" --intent cancel
else
  killswitch check --gate-socket "$1" --symbol AAPL --side buy --quantity 100 --position 0
fi || {
  echo "blocked"
  exit 3
}
echo "sent"
