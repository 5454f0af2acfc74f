/* The fake driver: ranges of addresses, and virtual memory management (cuMemCreate and its kin).
 *
 * "Device memory" is a memfd. Its addresses are reserved and unreadable for the CPU, so that a program that reads a
 * device pointer dies as on a card; copies go through a second, hidden mapping of the same memfd.
 * FAKE_CUDA_HOST_ACCESS=1 makes the addresses readable, for kernels that are interpreted on the CPU.
 *
 * In /proc/self/maps and /proc/self/fd, which tests read for leaks, everything here is named fake-cuda-*. */
#define _GNU_SOURCE
#include "state.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MEMFD_PREFIX "/memfd:fake-cuda-memory-"

typedef struct Allocation { /* what a handle of cuMemCreate or cuMemImportFromShareableHandle stands for */
    struct Allocation *next;
    CUmemGenericAllocationHandle handle;
    int fd, device, is_own;
    size_t size;
} Allocation;

static Allocation *allocations;
Range *ranges;
static CUmemGenericAllocationHandle last_handle = 0x1000;
size_t used_bytes;

int new_memfd(int device, size_t size) {
    char name[64] = "fake-cuda-memory-";
    for (int i = 0; i < 16; i++) sprintf(name + strlen(name), "%02x", (unsigned char)devices[device].uuid.bytes[i]);
    int fd = memfd_create(name, MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)size)) close(fd), fd = -1;
    return fd;
}

/* The device whose memory `fd` is. -1: it is no device memory; -2: it is that of a device that is not visible. */
static int device_of(int fd) {
    char path[64], target[256], hex[33] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(path, target, sizeof target - 1);
    if (length < 0) return -1;
    target[length] = 0;
    if (strncmp(target, MEMFD_PREFIX, strlen(MEMFD_PREFIX))) return -1;
    for (int device = 0; device < num_devices; device++) {
        for (int i = 0; i < 16; i++) sprintf(hex + 2 * i, "%02x", (unsigned char)devices[device].uuid.bytes[i]);
        if (!strncmp(target + strlen(MEMFD_PREFIX), hex, 32)) return device;
    }
    return -2;
}

static int is_mapping_of(Range *range, const void *address) {
    const char *byte = address;
    return range->kind != HOST && byte >= range->address && byte < range->address + range->size;
}

Range *find_range(CUdeviceptr address) {
    Range *range = ranges;
    while (range && !is_mapping_of(range, (void *)address)) range = range->next;
    return range;
}

Range *add_range(Range values) {
    Range *range = malloc(sizeof *range);
    *range = values;
    range->next = ranges;
    return ranges = range;
}

void remove_range(Range *range) {
    Range **link = &ranges;
    while (*link != range) link = &(*link)->next;
    *link = range->next;
    free(range);
}

/* Addresses that can be neither read nor written. A mapping of an empty memfd, since anonymous ones have no name in the
 * maps. */
char *reserve(size_t size) {
    int fd = memfd_create("fake-cuda-addresses", MFD_CLOEXEC);
    char *wide = mmap(NULL, size + GRANULARITY, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    close(fd);
    if (wide == MAP_FAILED) return NULL;
    char *address = (char *)(((uintptr_t)wide + GRANULARITY - 1) & ~(GRANULARITY - 1));
    if (address > wide) munmap(wide, (size_t)(address - wide));
    if (address + size < wide + size + GRANULARITY) munmap(address + size, (size_t)(wide + GRANULARITY - address));
    return address;
}

CUresult map_memory(Range *range, int fd, size_t size) {
    char *hidden = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (hidden == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    mmap(range->address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, 0);
    range->hidden = hidden;
    return CUDA_SUCCESS;
}

void grant_access(Range *range) {
    const char *host_access = getenv("FAKE_CUDA_HOST_ACCESS");
    range->can_access = 1;
    if (host_access && !strcmp(host_access, "1")) mprotect(range->address, range->size, PROT_READ | PROT_WRITE);
}

static Allocation *find_allocation(CUmemGenericAllocationHandle handle) {
    Allocation *allocation = allocations;
    while (allocation && allocation->handle != handle) allocation = allocation->next;
    return allocation;
}

static CUmemGenericAllocationHandle add_allocation(int fd, int device, int is_own, size_t size) {
    Allocation *allocation = malloc(sizeof *allocation);
    *allocation = (Allocation){allocations, ++last_handle, fd, device, is_own, size};
    allocations = allocation;
    return last_handle;
}

static CUresult check_properties(const CUmemAllocationProp *prop) {
    REQUIRE(prop->type == CU_MEM_ALLOCATION_TYPE_PINNED && prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE,
            CUDA_ERROR_INVALID_VALUE);
    REQUIRE_DEVICE(prop->location.id);
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(
    size_t *granularity, const CUmemAllocationProp *prop, CUmemAllocationGranularity_flags option) {
    ENTRY;
    REQUIRE((int)option >= 0 && option <= CU_MEM_ALLOC_GRANULARITY_RECOMMENDED, CUDA_ERROR_INVALID_VALUE);
    CUresult error = check_properties(prop);
    *granularity = GRANULARITY;
    return error;
}

CUresult cuMemCreate(
    CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop, unsigned long long flags) {
    ENTRY;
    REQUIRE(flags == 0 && size && size % GRANULARITY == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, CUDA_ERROR_NOT_SUPPORTED);
    CUresult error = check_properties(prop);
    if (error) return error;
    REQUIRE(size <= device_bytes - used_bytes, CUDA_ERROR_OUT_OF_MEMORY);
    int fd = new_memfd(prop->location.id, size);
    REQUIRE(fd >= 0, CUDA_ERROR_OUT_OF_MEMORY);
    used_bytes += size;
    *handle = add_allocation(fd, prop->location.id, 1, size);
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    ENTRY;
    Allocation **link = &allocations;
    while (*link && (*link)->handle != handle) link = &(*link)->next;
    Allocation *allocation = *link;
    REQUIRE(allocation, CUDA_ERROR_INVALID_VALUE);
    *link = allocation->next;
    if (allocation->is_own) used_bytes -= allocation->size; /* the driver counts it while it is mapped, too */
    close(allocation->fd);
    free(allocation);
    return CUDA_SUCCESS;
}

CUresult cuMemExportToShareableHandle(
    void *shareable, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type, unsigned long long flags) {
    ENTRY;
    Allocation *allocation = find_allocation(handle);
    REQUIRE(allocation && flags == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, CUDA_ERROR_NOT_SUPPORTED);
    int fd = dup(allocation->fd);
    REQUIRE(fd >= 0, CUDA_ERROR_UNKNOWN);
    *(int *)shareable = fd;
    return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(
    CUmemGenericAllocationHandle *handle, void *shareable, CUmemAllocationHandleType type) {
    ENTRY;
    struct stat status;
    int fd = (int)(intptr_t)shareable, device = device_of(fd);
    REQUIRE(type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, CUDA_ERROR_NOT_SUPPORTED);
    REQUIRE(device != -1 && !fstat(fd, &status), CUDA_ERROR_UNKNOWN);
    REQUIRE(device != -2, CUDA_ERROR_INVALID_DEVICE);
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    REQUIRE(own >= 0, CUDA_ERROR_UNKNOWN);
    *handle = add_allocation(own, device, 0, (size_t)status.st_size);
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(
    CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr hint, unsigned long long flags) {
    ENTRY;
    REQUIRE(flags == 0 && size && size % GRANULARITY == 0 && alignment % GRANULARITY == 0, CUDA_ERROR_INVALID_VALUE);
    (void)hint;
    char *reserved = reserve(size);
    REQUIRE(reserved, CUDA_ERROR_OUT_OF_MEMORY);
    add_range((Range){.kind = RESERVED, .address = reserved, .size = size, .device = -1, .fd = -1});
    *address = (CUdeviceptr)reserved;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    ENTRY;
    Range *range = find_range(address);
    REQUIRE(range && range->kind == RESERVED && !range->hidden, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(range->address == (char *)address && range->size == size, CUDA_ERROR_INVALID_VALUE);
    munmap(range->address, size);
    remove_range(range);
    return CUDA_SUCCESS;
}

/* A whole allocation into a whole reservation: the driver takes parts of reservations too, which MuxMesh does not. */
CUresult cuMemMap(
    CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags) {
    ENTRY;
    Range *range = find_range(address);
    Allocation *allocation = find_allocation(handle);
    REQUIRE(range && allocation && range->kind == RESERVED && !range->hidden && flags == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(range->address == (char *)address && range->size == size, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(offset == 0 && size == allocation->size, CUDA_ERROR_NOT_SUPPORTED);
    range->device = allocation->device;
    return map_memory(range, allocation->fd, size);
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
    ENTRY;
    Range *range = find_range(address);
    REQUIRE(range && range->kind == RESERVED && range->hidden, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(range->address == (char *)address && range->size == size, CUDA_ERROR_INVALID_VALUE);
    munmap(range->hidden, size);
    int fd = memfd_create("fake-cuda-addresses", MFD_CLOEXEC);
    mmap(range->address, size, PROT_NONE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0);
    close(fd);
    range->hidden = NULL;
    range->can_access = 0;
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *access, size_t count) {
    ENTRY;
    Range *range = find_range(address);
    REQUIRE(range && range->kind == RESERVED && range->hidden, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(range->size == size && count == 1, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(access->location.type == CU_MEM_LOCATION_TYPE_DEVICE, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(access->location.id == range->device, CUDA_ERROR_INVALID_DEVICE);
    REQUIRE(access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE, CUDA_ERROR_INVALID_VALUE);
    grant_access(range);
    return CUDA_SUCCESS;
}
