/* The time, for measuring. */
#ifndef TATARA_CLOCK_H
#define TATARA_CLOCK_H

/* Seconds since some fixed moment of this machine's. Any thread. */
double now_s(void);
/* Seconds that the threads of this process have computed, all together. */
double cpu_s(void);

#endif
