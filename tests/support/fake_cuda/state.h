/* What the parts of the fake driver share. */
#pragma once
#include "cuda_types.h"
#include <sys/types.h>

#define GRANULARITY (2ul << 20)
#define MAX_DEVICES 8

typedef struct {
    CUuuid uuid;
    int num_retained;  /* of the primary context */
} Device;

extern Device devices[MAX_DEVICES];
extern int num_devices;
extern size_t device_bytes;
extern __thread CUcontext current_context;

/* Every entry point begins with this: takes the lock until it returns, logs the call, answers what
 * FAKE_CUDA_ERRORS says, and refuses calls before cuInit and after a fork. */
CUresult enter(const char *function, int *num_calls, int needs_init);
void unlock(int *unused);

#define ENTRY_(needs_init)                                                      \
    static int num_calls;                                                       \
    __attribute__((cleanup(unlock))) int lock_;                                 \
    (void)lock_;                                                                \
    do {                                                                        \
        CUresult refusal = enter(__func__, &num_calls, needs_init);             \
        if (refusal) return refusal;                                            \
    } while (0)
#define ENTRY ENTRY_(1)
#define REQUIRE(condition, error) do { if (!(condition)) return error; } while (0)
#define REQUIRE_DEVICE(index) REQUIRE((index) >= 0 && (index) < num_devices, CUDA_ERROR_INVALID_DEVICE)

int num_sms(void); /* of this process: the share of a client of MPS */
int current_device(void); /* -1: no context is current in this thread */

typedef struct Range { /* a range of device addresses, or of registered host memory */
    struct Range *next;
    enum { RESERVED, PLAIN, IPC, HOST } kind;
    char *address, *hidden; /* hidden: NULL while nothing is mapped */
    size_t size;
    int device, can_access, fd, num_opened;
    pid_t owner;
} Range;

extern Range *ranges;
extern size_t used_bytes;

int new_memfd(int device, size_t size);
char *reserve(size_t size);
Range *find_range(CUdeviceptr address);
Range *add_range(Range values);
void remove_range(Range *range);
CUresult map_memory(Range *range, int fd, size_t size);
void grant_access(Range *range);
