/* Drives docs/examples/state_page.h for the tests: answers a line per line, or reads as fast as it can. C11 and C++17. */
#include "state_page.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static void answer_each_line(ks_page *page)
{
    char line[16];
    while (fgets(line, sizeof line, stdin)) {
        int64_t before = ks_now();
        ks_answer answer = ks_check(page);
        const ks_snapshot *said = &page->snapshot;
        printf("%d %" PRIu32 " %" PRIu32 " %.17g %" PRIu64 " %" PRId64 "\n", (int)answer, said->state, said->restriction,
               said->factor, said->epoch, ks_now() - before);
        (void)fflush(stdout);
    }
}

/*
 * The writer shows only pairs: epoch even with state 0 and factor 1, odd with state 1, halt and factor 0.25. Reads at least
 * so often, and until it has seen so many changes: on a busy machine the writer may have no CPU for a while.
 */
static int read_at_full_speed(ks_page *page, long least_reads, long least_changes)
{
    long reads = 0, torn = 0, changes = 0, stale = 0, backwards = 0;
    uint64_t epoch = 0;
    int64_t until = ks_now() + 60000000000;
    for (; (reads < least_reads || changes < least_changes) && ks_now() < until; reads++) {
        ks_answer answer = ks_check(page);
        const ks_snapshot *said = &page->snapshot;
        if (answer == KS_STALE) {
            stale++;
            continue;
        }
        bool odd = (said->epoch & 1) != 0;
        double factor = odd ? 0.25 : 1.0;
        if (said->state != (odd ? 1u : 0u) || said->restriction != (odd ? 2u : 0u) || memcmp(&said->factor, &factor, 8) != 0 ||
            answer != (odd ? KS_HALT : KS_ALLOW))
            torn++;
        if (said->epoch < epoch)
            backwards++;
        changes += said->epoch != epoch;
        epoch = said->epoch;
    }
    printf("reads %ld torn %ld backwards %ld stale %ld changes %ld\n", reads, torn, backwards, stale, changes);
    return torn == 0 && backwards == 0 ? 0 : 1;
}

int main(int argc, char **argv)
{
    ks_page page;
    if (argc < 2)
        return 2;
    ks_init(&page, argv[1]);
    if (argc > 3)
        return read_at_full_speed(&page, strtol(argv[2], NULL, 10), strtol(argv[3], NULL, 10));
    answer_each_line(&page);
    ks_close(&page);
    return 0;
}
