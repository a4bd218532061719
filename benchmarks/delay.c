/* Preloaded into a replica: while the file that DELAY_FILE names exists, what it sends to another actor leaves 40 ms late.
   Connections between actors are those with a port of transport.ports at one end. Sending takes no longer than usual: a
   thread sends what is due, in order.
   cc -shared -fPIC -o delay.so delay.c -ldl -lpthread */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define DELAY_NS 40000000L
#define FIRST_PORT 21000
#define LAST_PORT 21999

struct message {
    struct message *next;
    long due_ns;
    int socket;
    size_t size;
    char data[];
};

static struct message *first, **last = &first;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t added = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

static ssize_t really_send(int socket, const void *data, size_t size, int flags) {
    static ssize_t (*real)(int, const void *, size_t, int);
    if (real == NULL) real = dlsym(RTLD_NEXT, "send");
    return real(socket, data, size, flags);
}

static void *send_what_is_due(void *unused) {
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (first == NULL) pthread_cond_wait(&added, &lock);
        struct message *message = first;
        first = message->next;
        if (first == NULL) last = &first;
        pthread_mutex_unlock(&lock);
        long left_ns = message->due_ns - now_ns();
        if (left_ns > 0) usleep(left_ns / 1000);
        for (size_t sent = 0; sent < message->size;) {
            ssize_t more = really_send(message->socket, message->data + sent, message->size - sent, MSG_NOSIGNAL);
            if (more >= 0) sent += more;
            else usleep(1000);
        }
        free(message);
    }
    return NULL;
}

static void start(void) {
    pthread_t thread;
    pthread_create(&thread, NULL, send_what_is_due, NULL);
}

static int port_of(int socket, int (*name)(int, struct sockaddr *, socklen_t *)) {
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    if (name(socket, (struct sockaddr *)&address, &length) != 0) return 0;
    if (address.ss_family == AF_INET) return ntohs(((struct sockaddr_in *)&address)->sin_port);
    if (address.ss_family == AF_INET6) return ntohs(((struct sockaddr_in6 *)&address)->sin6_port);
    return 0;
}

static int is_between_actors(int socket) {
    int here = port_of(socket, getsockname), there = port_of(socket, getpeername);
    return (here >= FIRST_PORT && here <= LAST_PORT) || (there >= FIRST_PORT && there <= LAST_PORT);
}

/* Whether the message was taken, to be sent later. Nothing overtakes what is still waiting. */
static int delayed(int socket, const void *data, size_t size) {
    const char *file = getenv("DELAY_FILE");
    if (file == NULL || size == 0 || (first == NULL && access(file, F_OK) != 0) || !is_between_actors(socket)) return 0;
    pthread_once(&once, start);
    struct message *message = malloc(sizeof *message + size);
    *message = (struct message){NULL, now_ns() + DELAY_NS, socket, size};
    memcpy(message->data, data, size);
    pthread_mutex_lock(&lock);
    *last = message;
    last = &message->next;
    pthread_cond_signal(&added);
    pthread_mutex_unlock(&lock);
    return 1;
}

ssize_t send(int socket, const void *data, size_t size, int flags) {
    return delayed(socket, data, size) ? (ssize_t)size : really_send(socket, data, size, flags);
}

ssize_t write(int file, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (real == NULL) real = dlsym(RTLD_NEXT, "write");
    return delayed(file, data, size) ? (ssize_t)size : real(file, data, size);
}
