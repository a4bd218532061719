/* A small libnvidia-ml.so.1 for machines without a GPU: two GPUs, the second split into one MIG slice.
 *
 * FAKE_NVML_LOST names a file; while it exists, device 0 has fallen off the bus.
 * Compiled with -DNO_POWER the symbol nvmlDeviceGetPowerUsage is missing, as in an old driver.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, GPU_IS_LOST = 15 };

typedef struct { int index; const char *uuid; int is_mig; } Device;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;

static Device devices[] = {
    {0, "GPU-aaaaaaaa-0000-0000-0000-000000000000", 0},
    {1, "GPU-bbbbbbbb-1111-1111-1111-111111111111", 0},
    {1, "MIG-cccccccc-2222-2222-2222-222222222222", 1},
};

static int state(Device *device) {
    const char *lost = getenv("FAKE_NVML_LOST");
    return device->index == 0 && lost && access(lost, F_OK) == 0 ? GPU_IS_LOST : SUCCESS;
}

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlInitWithFlags(unsigned int flags) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int result) { return result == GPU_IS_LOST ? "GPU is lost" : "an NVML error"; }
int nvmlSystemGetDriverVersion(char *out, unsigned int length) { strncpy(out, "580.0", length); return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
    if (index > 1) return INVALID_ARGUMENT;
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    for (int i = 0; i < 3; i++)
        if (strcmp(uuid, devices[i].uuid) == 0) { *device = &devices[i]; return SUCCESS; }
    return NOT_FOUND;
}

int nvmlDeviceGetName(Device *device, char *out, unsigned int length) { strncpy(out, "NVIDIA H100", length); return SUCCESS; }
int nvmlDeviceIsMigDeviceHandle(Device *device, unsigned int *is_mig) { *is_mig = device->is_mig; return SUCCESS; }
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *mig, Device **parent) { *parent = &devices[mig->index]; return SUCCESS; }

int nvmlDeviceGetUUID(Device *device, char *out, unsigned int length) {
    strncpy(out, device->uuid, length);
    return state(device);
}

int nvmlDeviceGetIndex(Device *device, unsigned int *index) {
    if (device->is_mig) return NOT_SUPPORTED;
    *index = device->index;
    return state(device);
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    memory->total = device->is_mig ? 10000000000ull : 80000000000ull;
    memory->used = (device->index + 1) * 1000000000ull;
    memory->free = memory->total - memory->used;
    return state(device);
}

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) {
    if (device->is_mig) return NOT_SUPPORTED;
    rates->gpu = 40 + device->index;
    rates->memory = 10;
    return state(device);
}

int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned int *celsius) {
    if (device->is_mig) return NOT_SUPPORTED;
    *celsius = 50 + device->index;
    return state(device);
}

#ifndef NO_POWER
int nvmlDeviceGetPowerUsage(Device *device, unsigned int *milliwatts) {
    if (device->is_mig) return NOT_SUPPORTED;
    *milliwatts = 300500 + device->index;
    return state(device);
}
#endif
