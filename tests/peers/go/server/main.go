// The RPC tutorial's server, on amqp091-go.
//
// RPC_QUEUE names the queue; RPC_QUEUE_TYPE=quorum declares it like the current tutorials. RPC_PREFETCH is
// the prefetch count, 1 as in the tutorial; RPC_QUIET=1 prints no line per request.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"

	amqp "github.com/rabbitmq/amqp091-go"
)

var quiet = os.Getenv("RPC_QUIET") == "1"

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func env(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

func fib(n uint64) uint64 {
	var a, b uint64 = 0, 1
	for i := uint64(0); i < n; i++ {
		a, b = b, a+b
	}
	return a
}

// The tutorial's server ends if a body is not a number. fib(93) is the largest that fits in 64 bits.
func answer(body []byte) string {
	n, err := strconv.ParseUint(string(body), 10, 64)
	if err != nil || n > 93 {
		return "not a natural number up to 93"
	}
	if !quiet {
		fmt.Printf(" [.] fib(%d)\n", n)
	}
	return strconv.FormatUint(fib(n), 10)
}

func main() {
	prefetch, err := strconv.Atoi(env("RPC_PREFETCH", "1"))
	check(err)
	connection, err := amqp.Dial(env("AMQP_URL", "amqp://localhost"))
	check(err)
	channel, err := connection.Channel()
	check(err)
	durable, arguments := false, amqp.Table{}
	if os.Getenv("RPC_QUEUE_TYPE") == "quorum" {
		durable, arguments = true, amqp.Table{"x-queue-type": "quorum"}
	}
	queue, err := channel.QueueDeclare(env("RPC_QUEUE", "rpc_queue"), durable, false, false, false, arguments)
	check(err)
	check(channel.Qos(prefetch, 0, false))
	requests, err := channel.Consume(queue.Name, "", false, false, false, false, nil)
	check(err)
	fmt.Println(" [x] Awaiting RPC requests")
	for request := range requests {
		check(channel.PublishWithContext(context.Background(), "", request.ReplyTo, false, false, amqp.Publishing{
			ContentType:   "text/plain",
			CorrelationId: request.CorrelationId,
			Body:          []byte(answer(request.Body)),
		}))
		check(request.Ack(false))
	}
}
