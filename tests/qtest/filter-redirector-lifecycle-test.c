#include "qemu/osdep.h"
#include "filter-redirector-rig.h"

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-redirector-lifecycle");
    return g_test_run();
}
