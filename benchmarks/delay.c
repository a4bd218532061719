/* Preloaded into a replica: while the file that DELAY_FILE names exists, every message over TCP leaves 40 ms late.
   cc -shared -fPIC -o delay.so delay.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

ssize_t sendmsg(int socket, const struct msghdr *message, int flags) {
    static ssize_t (*real)(int, const struct msghdr *, int);
    struct sockaddr_storage peer;
    socklen_t length = sizeof peer;
    const char *file = getenv("DELAY_FILE");
    if (real == NULL) real = dlsym(RTLD_NEXT, "sendmsg");
    if (file != NULL && access(file, F_OK) == 0 && getpeername(socket, (struct sockaddr *)&peer, &length) == 0 &&
        (peer.ss_family == AF_INET || peer.ss_family == AF_INET6))
        usleep(40000);
    return real(socket, message, flags);
}
