#!/usr/bin/env bash
# The smoke test must fail when something is wrong: smoke_fails.sh REPOSITORY EMULATED_PROGRAM
#
# Runs scripts/smoke.sh on a stand-in for the program, which passes all on but one thing: on the GPU the learning rate is
# 1% too high; or the second half of a run reads other data than it should. Each must end with FAIL, and for that reason.
set -euo pipefail
repository=$1 program=$2
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT
export TMPDIR=$out

expect() { # expect REASON, of a smoke test with $out/program
    local log=$out/log rc=0
    chmod +x "$out/program"
    "$repository/scripts/smoke.sh" --emulated --program "$out/program" >"$log" || rc=$?
    if [[ $rc -ne 1 ]] || ! grep -q "^FAIL  .*$1" "$log"; then
        echo "status $rc; expected 1, and FAIL with \"$1\":"
        cat "$log"
        exit 1
    fi
}

cat >"$out/program" <<END
#!/bin/sh
case " \$* " in *" device=cuda "*) set -- "\$@" optim.lr=3.03e-4 ;; esac
exec "$program" "\$@"
END
expect 'fp32: GPU and CPU differ by more than rounding'

cat >"$out/program" <<END
#!/bin/sh
case " \$* " in
*/resumed*run.stop_at*) ;;
*/resumed*) set -- "\$@" run.seed=5 ;;
esac
exec "$program" "\$@"
END
expect 'losses differ after resuming'

cat >"$out/program" <<END
#!/bin/sh
case " \$* " in *" device=cuda "*) echo 'no GPU today' >&2 && exit 8 ;; esac
exec "$program" "\$@"
END
expect 'cuda-fp32 ended with status 8: no GPU today'
